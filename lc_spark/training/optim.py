"""Turns the gradients of one step's rows into an update of M1 (and the wide weights).

A step costs O(ids in the batch) in time and in what ranks send each other, never O(d): the tables
stay outside autograd, and only the rows that a batch names are read and written.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lc_spark.training.world import World


def sum_by_id(ids: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct ids [m], ascending, and the sums [m, k] of their gradients.

    ids int64 [n], gradients [n, k]; (largest id + 1) * n has to stay below 2^62. The sums are in
    the order of the rows, so on the CPU they are the same every time.
    """
    ascending, order = sorted_ids(ids)
    distinct, counts = torch.unique_consecutive(ascending, return_counts=True)
    starts = counts.cumsum(0) - counts
    return distinct, torch.nn.functional.embedding_bag(order, gradients, starts, mode="sum")


def sorted_ids(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids [n] ascending and the places that they had, those of equal ids ascending too."""
    if ids.device.type != "cpu":
        ascending, order = torch.sort(ids, stable=True)
        return ascending, order
    # A place's bits below its id's: numpy sorts plain int64 many times as fast as torch sorts
    # int64 with their places, or finds distinct ones through a hash table.
    bits = len(ids).bit_length()
    packed = (ids << bits).add_(torch.arange(len(ids)))
    packed.numpy().sort()
    return packed >> bits, packed.bitwise_and_((1 << bits) - 1)


class RowAdam:
    """Adam (Kingma and Ba 2015) over the rows present in a step, with decoupled weight decay.

    A row's moments stand still while it is absent; the bias correction counts steps, not a row's
    own updates, as torch.optim.SparseAdam has it. Tried on the flights against a count a row and
    against Adagrad: all within .002 AUC of each other, each with its own best learning rate.
    """

    BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8

    def __init__(
        self, tables: Sequence[Tensor], learning_rate: float, weight_decay: float, world: World
    ) -> None:
        """Take tables [d, k_i] that share their ids; they are changed in place."""
        self.tables = [table.detach() for table in tables]
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.world = world
        self.steps = torch.zeros((), dtype=torch.int64)
        self.first = [torch.zeros_like(table) for table in self.tables]
        self.second = [torch.zeros_like(table) for table in self.tables]

    def step(self, ids: Tensor, gradients: Sequence[Tensor | None], factor: float) -> None:
        """Update the rows that any rank names by the mean over ranks of their summed gradients.

        ids int64 [n]; gradients [n, k_i], one entry a table, None for one that stands still;
        factor scales the learning rate. Collective: every rank calls it, with its own ids.
        """
        moving = [i for i, gradient in enumerate(gradients) if gradient is not None]
        ids, summed = sum_by_id(ids, torch.cat([g for g in gradients if g is not None], dim=1))
        if self.world.size > 1:
            ids, summed = sum_by_id(self.world.gather(ids), self.world.gather(summed))
            summed /= self.world.size
        self.steps += 1
        steps = int(self.steps)
        rate = self.learning_rate * factor
        step_size = rate * math.sqrt(1 - self.BETA2**steps) / (1 - self.BETA1**steps)
        widths = [self.tables[i].shape[1] for i in moving]
        for i, gradient in zip(moving, torch.split(summed, widths, dim=1), strict=True):
            # Not by brackets: these copy whole rows, those element by element.
            first = self.first[i].index_select(0, ids).lerp_(gradient, 1 - self.BETA1)
            second = self.second[i].index_select(0, ids).lerp_(gradient.square(), 1 - self.BETA2)
            self.first[i].index_copy_(0, ids, first)
            self.second[i].index_copy_(0, ids, second)
            rows = self.tables[i].index_select(0, ids).mul_(1 - rate * self.weight_decay)
            rows.addcdiv_(first, second.sqrt_().add_(self.EPSILON), value=-step_size)
            self.tables[i].index_copy_(0, ids, rows)

    def state(self) -> dict[str, Tensor]:
        """Return the state by name; the tensors are the optimiser's own, not copies."""
        named = {"steps": self.steps}
        for i, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            named |= {f"first.{i}": first, f"second.{i}": second}
        return named

    def load_state(self, named: dict[str, Tensor]) -> None:
        """Take over what state returned, values copied."""
        for name, tensor in self.state().items():
            tensor.copy_(named[name])
