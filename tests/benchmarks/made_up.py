"""Makes encoded shards, batches, learners and ranks for the benchmarks, without Spark."""

import contextlib
import json
import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.systems import SystemKind, Training
from lc_spark.training import models
from lc_spark.training.allocator import keep_memory
from lc_spark.training.learner import Learner
from lc_spark.training.loader import Batch
from lc_spark.training.models import LcNetwork, Lr
from lc_spark.training.start import Copies
from lc_spark.training.world import World, joined

keep_memory()  # before the first tensor, as a rank does
T = TypeVar("T")
# The paper's AppData, and its K1 and K2.
F, CONTINUOUS, D, HIDDEN, BATCH_SIZE = 158, 26, 8_672_633, (2048, 1024), 4096
FOLDS = 5


@dataclass(frozen=True)
class Ids:
    """How indices fall in a field of n features: floor(n * u ** skew), u uniform in [0, 1).

    A skew of 1 is uniform; of 4, half of the rows share one sixteenth of the features.
    """

    skew: float = 4.0

    def draw(self, random: np.random.Generator, size: int, rows: int) -> NDArray[np.int32]:
        """Return indices [rows] in 0 .. size - 1."""
        return (size * random.random(rows) ** self.skew).astype(np.int32)


def field_map(f: int, continuous: int, d: int) -> FieldMap:
    """Return f fields of d features, `continuous` of them continuous, the others unequal in size.

    The largest categorical field has a hundred thousand times the features of the smallest, if d
    allows: as in a click log, where a few fields of ids make up d.
    """
    count, features = f - continuous, d - 2 * continuous
    shares = np.geomspace(1, 1e5, count)
    sizes = 3 + ((features - 3 * count) * shares / shares.sum()).astype(np.int64)
    sizes[-1] += features - sizes.sum()
    infos = [FieldInfo(f"c{i}", "categorical", int(size)) for i, size in enumerate(sizes)]
    infos += [FieldInfo(f"n{i}", "continuous", 2) for i in range(continuous)]
    return FieldMap(tuple(infos))


def columns(
    fields: FieldMap, rows: int, random: np.random.Generator, ids: Ids
) -> dict[str, NDArray[Any]]:
    """Return encoded columns [rows] by field name."""
    return {
        info.name: random.normal(size=rows).astype(np.float32)
        if info.kind == "continuous"
        else ids.draw(random, info.size, rows)
        for info in fields.fields
    }


def batches(fields: FieldMap, count: int, batch_size: int, ids: Ids, seed: int = 0) -> list[Batch]:
    """Return batches in memory."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        x, values = models.to_tensors(columns(fields, batch_size, random, ids), fields)
        labels = torch.from_numpy((random.random(batch_size) < 0.2).astype(np.float32))
        row_ids = torch.arange(batch_size) + number * batch_size
        made.append(Batch(x, values, labels, row_ids, row_ids % FOLDS))
    return made


def distinct(batch: Batch) -> int:
    """Return the number of distinct ids in a batch."""
    return len(np.unique(batch.ids.numpy()))


def write_shards(
    folder: Path, fields: FieldMap, groups: int, rows_per_group: int, ids: Ids
) -> dict[str, Any]:
    """Write a train split of so many part files of one row group each; return the manifest."""
    random = np.random.default_rng(0)
    split = folder / "split=train"
    split.mkdir(parents=True)
    for number in range(groups):
        row_ids = np.arange(rows_per_group) + number * rows_per_group
        table = {
            "row_id": row_ids,
            "label": (random.random(rows_per_group) < 0.2).astype(np.float32),
            "fold": (row_ids % FOLDS).astype(np.int32),
            "date": np.full(rows_per_group, 19_000, np.int32),
            **columns(fields, rows_per_group, random, ids),
        }
        path = split / f"part-{number:05d}.parquet"
        pq.write_table(pa.table(table), path, compression="zstd", row_group_size=rows_per_group)
    manifest = {
        "fingerprint": fields.fingerprint,
        "splits": {"train": {"row_groups": [rows_per_group] * groups}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return manifest


def learner(
    system: SystemKind, fields: FieldMap, settings: Training, world: World | None = None
) -> Learner:
    """Return a learner of a system whose LRs, where its start needs them, are random numbers."""
    torch.manual_seed(0)
    world = world or World(0, 1, torch.device("cpu"))
    model = models.build(system, fields, settings)
    copies = None
    if isinstance(model, LcNetwork) and settings.start == "lr_cross_fitted":
        held_out = [Lr(fields.d) for _ in range(FOLDS)]
        for lr in held_out:
            torch.nn.init.normal_(lr.weight)
        copies = Copies(held_out, held_out[0] if settings.m1 == "frozen" else None)
        model.m1.weight.requires_grad_(settings.channels > 1)
    made = Learner(model, settings, 1_000_000, world, copies)
    made.model.train()
    return made


def in_ranks(work: Callable[..., T], size: int, *arguments: Any) -> list[T]:
    """Return what work(world, *arguments) returns in each of `size` new processes, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_one_rank, args=(results, rank, size, port, work, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a rank failed: see above")
    by_rank = dict(results.get() for _ in processes)
    return [by_rank[rank] for rank in range(size)]


def _one_rank(
    results: Any, rank: int, size: int, port: int, work: Callable[..., T], arguments: Any
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # The lines of a rank about its place would break up the table.
    with contextlib.redirect_stdout(None), joined("cpu") as world:
        result = work(world, *arguments)
    results.put((rank, result))


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the exponent e of the power law y = c x ** e that fits best, in logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
