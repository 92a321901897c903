"""Turns LR models into the start of a network's M1.

A network that starts from LR weights of the very rows it trains on learns to trust them too much:
LR fits the rare values of its own rows almost perfectly, and of no others. So M1 can be copies,
each of an LR that has not seen the rows which read it.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lc_spark.errors import LcSparkError
from lc_spark.field_map import FieldMap, require_same
from lc_spark.files import as_path
from lc_spark.systems import HELD_OUT, Training
from lc_spark.training import models
from lc_spark.training.models import LcNetwork, Lr, TrainedNetwork
from lc_spark.training.optim import RowAdam
from lc_spark.training.spec import LEARNER_FILE, TrainSpec
from lc_spark.training.tensors import load_tensors

if TYPE_CHECKING:
    from lc_spark.training.learner import Learner


class Copies:
    """Channel 0 of M1 once for each fold; what training reads in its place."""

    def __init__(self, held_out: list[Lr], final: Lr | None) -> None:
        """Take one LR a fold (or one for all rows), and what M1 is set to in the end.

        With a final LR the copies stay as they are. Without one they are trained, each by its own
        rows, and M1 is their mean.
        """
        # A feature's copies lie side by side, so a field's ids lie above those of fields before it.
        weights = torch.stack([lr.weight.detach().float() for lr in held_out], dim=1)
        self.table = weights.reshape(-1, 1)
        self.folds = len(held_out)
        self.final = None if final is None else final.weight.detach().float()
        self.row_adam: RowAdam | None = None  # the learner's, when copies are trained

    def to(self, device: torch.device) -> None:
        """Move the copies to a device."""
        self.table = self.table.to(device)
        self.final = None if self.final is None else self.final.to(device)

    def ids(self, ids: Tensor, folds: Tensor) -> Tensor:
        """Return the rows [B, C] of `table` for global ids [B, C] of rows of the folds [B]."""
        return ids if self.folds == 1 else torch.add(folds.unsqueeze(1), ids, alpha=self.folds)

    def settle(self, m1: Tensor) -> None:
        """Write the one M1 that the copies amount to into channel 0 of m1 [d, k]."""
        with torch.no_grad():
            if self.final is not None:
                m1[:, 0] = self.final
            else:
                m1[:, 0] = self.table.view(-1, self.folds).mean(1)


def at_start(
    spec: TrainSpec, settings: Training, field_map: FieldMap
) -> tuple[TrainedNetwork, Copies | None]:
    """Return a network of the spec's system with M1 at its start, and the copies of M1 if any.

    Raises LcSparkError when an LR is missing or belongs to another field map.
    """
    model, copies = models.build(spec.system, field_map, settings), None
    start = settings.start
    if not isinstance(model, LcNetwork) or start == "random":
        return model, None
    final = _lr(spec.lr_model, field_map, start)
    if start == "frozen":
        copies = Copies([final], final)
    elif start in HELD_OUT:
        held_out = [_lr(folder, field_map, start) for folder in spec.held_out_lr or (None,)]
        copies = Copies(held_out, final if settings.m1 == "frozen" else None)
    if copies is None:
        models.start_from_lr(model, final)
        return model, None
    copies.settle(model.m1.weight)
    # With copies to the end, an M1 of one channel is never read.
    to_the_end = start == "frozen" or settings.m1 == "joint" or settings.joint_epochs == 0
    model.m1.weight.requires_grad_(not (settings.channels == 1 and to_the_end))
    return model, copies


def go_on(spec: TrainSpec, learner: "Learner", field_map: FieldMap) -> None:
    """Let a learner go on from the spec's parent, where there is one."""
    if spec.parent is None or spec.parent_map is None:
        return
    learner.world.say(f"{spec.name}: going on from {spec.parent}")
    places = FieldMap.read(as_path(spec.parent_map)).places_in(field_map)
    learner.take_over(load_tensors(as_path(spec.parent) / LEARNER_FILE), torch.from_numpy(places))


def _lr(folder: str | None, field_map: FieldMap, start: str) -> Lr:
    if folder is None:
        raise LcSparkError(
            f"training.start is {start}, but there is no LR model for it: run the train_lr stage "
            "first, or set it to random."
        )
    lr, description = models.load(as_path(folder))
    require_same(field_map.fingerprint, description["fingerprint"], f"The LR in {folder}")
    assert isinstance(lr, Lr), "an LR's folder holds an LR"
    return lr
