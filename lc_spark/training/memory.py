"""Refuses a model that the machine cannot hold, before anything of it is allocated."""

import gc

import psutil
import torch

from lc_spark.errors import LcSparkError
from lc_spark.field_map import FieldMap
from lc_spark.parameters import ParameterCount, copies_bytes, parameter_count
from lc_spark.systems import SystemKind, Training
from lc_spark.training.world import World


def check_memory(
    system: SystemKind,
    count: ParameterCount,
    field_map: FieldMap,
    settings: Training,
    folds: int,
    world: World,
) -> None:
    """Raise LcSparkError on every rank when one of them lacks the memory for weights and Adam.

    folds is the number of held-out LRs that M1 starts from. Collective. The ranks of a host share
    its memory; a GPU has its own.
    """
    needed = count.training_bytes + copies_bytes(folds, field_map.d, settings.m1)
    if world.device.type == "cuda":
        gc.collect()  # what the network before held
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(world.device)
    else:
        free = psutil.virtual_memory().available // world.ranks_on_this_host()
    spare = free - needed
    mine = torch.tensor([[spare < 0, free // 2**20]], device=world.device)
    short = world.gather(mine)
    if not bool(short[:, 0].any()):
        return
    f, hidden = len(field_map.fields), settings.hidden
    lc_dnn = parameter_count("lc_dnn", field_map.d, f, hidden, 1, settings.batch_norm)
    raise LcSparkError(
        f"{system} has {count.total:,} parameters and needs {_gb(needed)} a rank for them, "
        f"Adam's moments and copies of M1; a rank has {_gb(int(short[:, 1].min()) * 2**20)}. "
        f"lc_dnn over the same {field_map.d:,} features has {lc_dnn.total:,} and needs "
        f"{_gb(lc_dnn.training_bytes)}. Take that, or fewer features, ranks or units in "
        "training.hidden."
    )


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.2f} GB"
