"""Turns a batch of rows into one update of every LR that a config needs.

The network is the paper's Fig. 1, M1 M2 with M2 all ones: a row's logit is the sum of the rows of
M1 that its features name. M1 has a column an LR here, [d, n], so that rows are read and their ids
sorted once for all of them. A row that an LR must not see contributes nothing to its column.

Tensor names end in their shape: B rows, C features of a row, n LRs, P parts, m distinct features.
"""
# ruff: noqa: N803, N806, N815 (the shape suffixes are upper case)

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag, softplus

from lc_spark.errors import LcSparkError
from lc_spark.field_map import FieldMap
from lc_spark.files import AnyPath
from lc_spark.training.optim import sorted_ids, sum_by_id
from lc_spark.training.proximal import ProximalAdagrad
from lc_spark.training.world import World

WEIGHTS_FILE = "lr_weights.parquet"  # of the LR of all rows: field, index, weight


@dataclass(frozen=True)
class Part:
    """The train rows that an LR sees: all of them, those of other folds, or those of days before.

    name is the LR's folder under models/.
    """

    name: str
    rows: int
    fold: int | None = None  # held out
    before: int | None = None  # days since 1970

    @property
    def held_out(self) -> bool:
        """Whether there are train rows that the LR does not see."""
        return self.fold is not None or self.before is not None


class Rows(NamedTuple):
    """A batch on this rank's device."""

    ids_BC: Tensor
    values_BC: Tensor | None
    labels_B: Tensor
    folds_B: Tensor
    dates_B: Tensor | None  # days since 1970


class LrNetwork:
    """LRs of every part at every l2; the l2s of a part lie side by side in M1's columns."""

    def __init__(
        self,
        d: int,
        parts: Sequence[Part],
        l2: Sequence[float],
        learning_rate: float,
        steps_per_epoch: int,
        epochs: int,
        world: World,
    ) -> None:
        """Start all LRs at zero."""
        self.parts, self.l2, self.world = parts, l2, world
        penalties = [part.rows * one for part in parts for one in l2]
        self.optimiser = ProximalAdagrad(
            d, penalties, learning_rate, steps_per_epoch, epochs, world.device
        )

    def columns(self, l2: float) -> list[int]:
        """Return where the LRs of an l2 are among all, one a part."""
        return [p * len(self.l2) + list(self.l2).index(l2) for p in range(len(self.parts))]

    def step(self, rows: Rows) -> Tensor:
        """Update all LRs by one batch a rank; return sums of losses and rows seen, float64 [2, n].

        Collective; the sums are of this rank's rows, met before they are learnt from.
        """
        seen_Bn = self.seen(rows).repeat_interleave(len(self.l2), dim=1)
        labels_B1, values_BC = rows.labels_B.unsqueeze(1), rows.values_BC
        if self.optimiser.steps == 0:
            self._start_biases(labels_B1, seen_Bn)
        ascending, order = sorted_ids(rows.ids_BC)
        ids, places, counts_m = torch.unique_consecutive(
            ascending, return_inverse=True, return_counts=True
        )
        places_BC = torch.empty_like(order).scatter_(0, order, places).view_as(rows.ids_BC)
        logits_Bn = logits(self.optimiser.read(ids), self.optimiser.bias, places_BC, values_BC)
        residuals_Bn = (torch.sigmoid(logits_Bn) - labels_B1) * seen_Bn
        # The transposed product: the bag of a feature holds the rows that it is in.
        gradients_mn = embedding_bag(
            order // rows.ids_BC.shape[1],
            residuals_Bn,
            counts_m.cumsum(0) - counts_m,
            mode="sum",
            per_sample_weights=None if values_BC is None else values_BC.flatten()[order],
        )
        bias_gradient = residuals_Bn.sum(0)
        if self.world.size > 1:
            ids, gradients_mn = sum_by_id(self.world.gather(ids), self.world.gather(gradients_mn))
            bias_gradient = self.world.mean(bias_gradient) * self.world.size
        self.optimiser.step(ids, gradients_mn, bias_gradient)
        return torch.stack([losses(logits_Bn, labels_B1, seen_Bn), seen_Bn.double().sum(0)])

    def _start_biases(self, labels_B1: Tensor, seen_Bn: Tensor) -> None:
        """Set each bias to the log odds of its rows of the first batch, as MLlib does of all.

        Features then explain what differs from the mean, and do not first have to find it.
        """
        counts = torch.stack([(seen_Bn * labels_B1).sum(0), seen_Bn.sum(0)])
        positives, seen = self.world.mean(counts)
        self.optimiser.bias += torch.log((positives + 1) / (seen - positives + 1))

    def seen(self, rows: Rows) -> Tensor:
        """Return float32 [B, P]: 1 where the LR of a part sees a row, 0 where it does not."""
        seen_BP = torch.ones(len(rows.labels_B), len(self.parts), device=self.world.device)
        for place, part in enumerate(self.parts):
            if part.fold is not None:
                seen_BP[:, place] = (rows.folds_B != part.fold).float()
            elif part.before is not None:
                assert rows.dates_B is not None, "dates come along where a part needs them"
                seen_BP[:, place] = (rows.dates_B < part.before).float()
        return seen_BP


def logits(weights: Tensor, bias: Tensor, ids_BC: Tensor, values_BC: Tensor | None) -> Tensor:
    """Return logits [B, n] by weights [m, n] and bias [n]; values of None stand for ones."""
    return embedding_bag(ids_BC, weights, mode="sum", per_sample_weights=values_BC) + bias


def losses(logits_Bn: Tensor, labels_B1: Tensor, seen_Bn: Tensor) -> Tensor:
    """Return the sums [n] of the log losses of the rows seen, in float64."""
    return ((softplus(logits_Bn) - labels_B1 * logits_Bn) * seen_Bn).double().sum(0)


def write_weights(weights: NDArray[Any], field_map: FieldMap, path: AnyPath) -> None:
    """Write weights [d] as a table of (field string, index int, weight double)."""
    schema = pa.schema([("field", pa.string()), ("index", pa.int32()), ("weight", pa.float64())])
    with path.open("wb") as file, pq.ParquetWriter(file, schema) as writer:
        for info in field_map.fields:
            field = pa.array(np.repeat(info.name, info.size), pa.string())
            index = np.arange(info.size, dtype=np.int32)
            weight = weights[info.offset : info.offset + info.size].astype(np.float64)
            writer.write_table(pa.table([field, index, weight], schema=schema))


def check_memory(d: int, parts: int, paths: int, world: World) -> None:
    """Raise LcSparkError on every rank when one of them lacks the memory. Collective."""
    needed = lr_bytes(d, parts, paths)
    if world.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(world.device)
    else:
        free = psutil.virtual_memory().available // world.ranks_on_this_host()
    least = int(world.gather(torch.tensor([free // 2**20], device=world.device)).min()) * 2**20
    if needed > least:
        raise LcSparkError(
            f"{parts} LRs (one of all rows, the others for a start of M1) at {paths} values of "
            f"lr.l2 over {d:,} features need {needed / 1e9:,.2f} GB a rank, and a rank has "
            f"{least / 1e9:,.2f} GB. With one lr.l2 it is {lr_bytes(d, parts, 1) / 1e9:,.2f} GB; "
            "lower shards.folds or training.ranks, or raise min_count."
        )


def lr_bytes(d: int, parts: int, paths: int) -> int:
    """Return what a rank needs for LRs of so many parts and values of l2 over d features.

    float32 weight and sum of squares each, the step a feature was last met, and at the end a copy
    of the chosen LRs' weights.
    """
    return d * (8 * parts * paths + 4 + 4 * max(parts, paths))
