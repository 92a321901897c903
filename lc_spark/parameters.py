"""Counts the parameters of every system, for the tables, the models and what is yet to be built."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from lc_spark.systems import SystemKind

BYTES = 12  # a float32 weight and its two Adam moments


@dataclass(frozen=True)
class ParameterCount:
    """What a network trains.

    weights: by the paper's formulas (its Table 2), the output layer included. others: the vectors
    beside them, biases and the scale and shift of BatchNorm.
    """

    weights: int
    others: int

    @property
    def total(self) -> int:
        """Number of values in all trained tensors."""
        return self.weights + self.others

    @property
    def training_bytes(self) -> int:
        """Memory of a rank for the weights and what Adam keeps of them."""
        return self.total * BYTES


def parameter_count(
    system: SystemKind,
    d: int,
    f: int,
    hidden: Sequence[int],
    channels: int = 1,
    batch_norm: bool = True,
) -> ParameterCount:
    """Count the parameters of a system for d features in f fields.

    hidden is K1 .. Kn, channels k. LR and its equivalent: d. DNN: d K1 + K1 K2 + ... + Kn. LC-DNN:
    d k + f k K1 + K1 K2 + ... + Kn; LC-W&D (and Wide & Deep): d more. LC-ResNet: d k + f k K, with
    K = K1, then 2 K Ki for each of n blocks, then K.
    """
    if system in ("lr", "lr_equivalent"):
        return ParameterCount(d, 1)
    norm = 2 if batch_norm else 0  # a scale and a shift
    if system == "lc_resnet":
        width = hidden[0]
        blocks = sum(2 * width * inner for inner in hidden)
        # A bias follows every product; BatchNorm makes up for the first of a block.
        inner = sum(hidden) * (norm or 1)
        others = width + inner + (norm + 1) * width * len(hidden) + norm * width + 1
        return ParameterCount(d * channels + f * channels * width + blocks + width, others)
    others = sum(hidden) * (norm or 1) + 1
    if system == "dnn":
        return ParameterCount(_products([d, *hidden, 1]), others)
    wide = d if system in ("lc_wd", "wide_deep") else 0
    weights = d * channels + _products([f * channels, *hidden, 1]) + wide
    return ParameterCount(weights, others)


def copies_bytes(folds: int, d: int, m1: str) -> int:
    """Return what copies of M1 take in a rank: float64 as read, then float32, moments if joint.

    folds is the number of held-out LRs that M1 starts from.
    """
    return folds * d * (8 + (BYTES if m1 == "joint" else 4))


def _products(sizes: Sequence[int]) -> int:
    return sum(a * b for a, b in itertools.pairwise(sizes))
