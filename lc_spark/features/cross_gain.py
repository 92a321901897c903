"""What a cross of two fields says beyond all single fields, in numpy on a sample of coded rows.

The base is a logistic model that is additive in all fields of the sample, fitted once for each fold
on the rows of the other folds. A cross then moves the logit of each of its cells: by the rate that
the cell has in those rows, smoothed towards the rate that the base gives them. Its gain is what
that takes off the log loss of the rows of the fold, so cells that hold noise cost instead of gain,
and what the parents say alone, correlated or not, is in the base already.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

FOLDS = 4
MIN_COUNT = 5  # rows of the other folds that a cell needs to say anything: min_count of a cross
SWEEPS, TOLERANCE = 12, 0.01  # passes over the fields; root mean square of a step, in logits
LONGEST_STEP = 1.0  # in logits: Newton's own steps diverge where the label is rare
DETERMINED = 0.05  # least share of a parent's entropy that the other parent must leave open

Floats = NDArray[np.float64]
Codes = NDArray[np.int32]


@dataclass(frozen=True)
class Sample:
    """n rows: codes [fields, n] count 0 .. sizes - 1 in each field, label and fold are [n]."""

    codes: Codes
    sizes: tuple[int, ...]
    label: Floats
    fold: NDArray[np.int64]


@dataclass(frozen=True)
class Base:
    """The sample and what the additive model says of it.

    logits [n] are of the model without the row's own fold; probabilities [FOLDS, n] are of the
    model without each fold, 0 for the rows of that fold.
    """

    sample: Sample
    logits: Floats
    probabilities: Floats


@dataclass(frozen=True)
class Gain:
    """Mean gain in nats a row with its standard error, and the mean of the worst fold.

    cells counts those with at least MIN_COUNT rows.
    """

    mean: float
    standard_error: float
    worst_fold: float
    cells: int


def dense_codes(indices: NDArray[np.int32] | NDArray[np.int64]) -> tuple[Codes, int]:
    """Return codes 0 .. k - 1 for the k distinct values that occur, in their order, and k."""
    values, codes = np.unique(indices, return_inverse=True)
    return codes.astype(np.int32), len(values)


def fit_base(sample: Sample) -> Base:
    """Fit the additive model once a fold, on the rows of the other folds."""
    n = len(sample.label)
    logits, probabilities = np.zeros(n), np.zeros((FOLDS, n))
    for fold in range(FOLDS):
        held = sample.fold == fold
        if held.all() or not held.any():
            continue  # a few rows only: nothing to learn from, or nothing to judge
        intercept, effects = _fit_additive(
            [codes[~held] for codes in sample.codes], sample.sizes, sample.label[~held]
        )
        here = np.full(n, intercept)
        for codes, effect in zip(sample.codes, effects, strict=True):
            here += effect[codes]
        logits[held] = here[held]
        probabilities[fold, ~held] = _sigmoid(here[~held])
    return Base(sample, logits, probabilities)


def _fit_additive(
    codes: list[Codes], sizes: tuple[int, ...], label: Floats
) -> tuple[float, list[Floats]]:
    """Return intercept and effects by level, each field shrunk as its own effects vary.

    Newton's method a field at a time. The ridge of a field is one over the variance of its
    effects, estimated in passing by the EM step of a random-effects model.
    """
    rate = (label.sum() + 0.5) / (len(label) + 1)
    intercept = float(np.log(rate / (1 - rate)))
    logits = np.full(len(label), intercept)
    effects = [np.zeros(size) for size in sizes]
    ridges = [10.0] * len(sizes)
    for _ in range(SWEEPS):
        p = _sigmoid(logits)
        shift = float(np.clip((label - p).sum() / (p * (1 - p)).sum(), -LONGEST_STEP, LONGEST_STEP))
        intercept, logits = intercept + shift, logits + shift
        largest = 0.0
        for i, (code, size) in enumerate(zip(codes, sizes, strict=True)):
            p = _sigmoid(logits)
            gradient = np.bincount(code, label - p, size) - ridges[i] * effects[i]
            curvature = np.bincount(code, p * (1 - p), size) + ridges[i]
            step = np.clip(gradient / curvature, -LONGEST_STEP, LONGEST_STEP)
            effects[i] += step
            moves = step[code]
            logits += moves
            largest = max(largest, float(np.sqrt(np.mean(moves**2))))
            ridges[i] = size / float(np.sum(effects[i] ** 2 + 1 / curvature))
        if largest < TOLERANCE:
            break
    return intercept, effects


def cross_gain(base: Base, first: int, second: int) -> Gain | None:
    """Return the gain of the cross of two fields, or None where one determines the other.

    Needs memory in proportion to the rows, however many combinations the fields have.
    """
    sample = base.sample
    cells, n_cells = _cells(sample, (first, second))
    places = cells * FOLDS + sample.fold
    counts, positives = (
        np.bincount(places, weights, n_cells * FOLDS).reshape(n_cells, FOLDS).astype(np.float64)
        for weights in (None, sample.label)
    )
    rows = counts.sum(axis=1)
    if _left_open(sample, first, second, rows) < DETERMINED:
        return None
    expected = [np.bincount(cells, p, n_cells) for p in base.probabilities]
    effects = _cell_effects(
        _of_other_folds(counts), _of_other_folds(positives), np.stack(expected, axis=1)
    )
    moves = effects.ravel()[places]
    # Rows of cells that say nothing keep their loss.
    at = np.flatnonzero(moves)
    z, u = base.logits[at], moves[at]
    gains = np.zeros(len(moves))
    gains[at] = np.logaddexp(0, z) - np.logaddexp(0, z + u) + sample.label[at] * u
    error = gains.std() / np.sqrt(len(gains))
    fold_rows = np.bincount(sample.fold)
    fold_gains = np.bincount(sample.fold, gains)[fold_rows > 0] / fold_rows[fold_rows > 0]
    n_known = int((rows >= MIN_COUNT).sum())
    return Gain(float(gains.mean()), float(error), float(fold_gains.min()), n_known)


def with_cross(sample: Sample, parents: Sequence[int]) -> Sample:
    """Return the sample with the cross of some of its fields as one field more."""
    codes, size = dense_codes(_cells(sample, parents)[0])
    return replace(sample, codes=np.vstack([sample.codes, codes]), sizes=(*sample.sizes, size))


def _cells(sample: Sample, parents: Sequence[int]) -> tuple[NDArray[np.int64], int]:
    """Return the cell of each row and the number of cells, which is bounded by the rows."""
    first, *others = parents
    cells, size = sample.codes[first].astype(np.int64), sample.sizes[first]
    for other in others:
        cells = cells * sample.sizes[other] + sample.codes[other]
        size *= sample.sizes[other]
        if size > len(cells):
            codes, size = dense_codes(cells)
            cells = codes.astype(np.int64)
    return cells, size


def _of_other_folds(sums: Floats) -> Floats:
    others: Floats = sums.sum(axis=1, keepdims=True) - sums
    return others


def _cell_effects(rows: Floats, positives: Floats, expected: Floats) -> Floats:
    """Return the effect of each cell and held-out fold in logits, [cells, FOLDS].

    The smoothing is that many rows at the expected rate; how many, the moments of a beta-binomial
    model say: with no more spread between cells than chance has, infinitely many.
    """
    known = rows >= MIN_COUNT
    rate = np.clip(np.where(known, expected / np.maximum(rows, 1), 0.5), 1e-9, 1 - 1e-9)
    chance = rows * rate * (1 - rate)
    excess = np.sum(((positives - expected) ** 2 - chance) * known, axis=0)
    spread = np.sum(chance * (rows - 1) * known, axis=0)
    smoothing = np.maximum(spread / np.maximum(excess, 1e-12) - 1, 1.0)
    smoothed = (positives + smoothing * rate) / (rows + smoothing)
    effects = np.log(smoothed / (1 - smoothed)) - np.log(rate / (1 - rate))
    return np.where(known & (excess > 0), effects, 0.0)


def _left_open(sample: Sample, first: int, second: int, rows: Floats) -> float:
    """Return the share of entropy that either parent leaves open in the other, the lesser one."""
    alone = [_entropy(np.bincount(sample.codes[i])) for i in (first, second)]
    both = _entropy(rows)
    # Given the first, both - alone[0] of the second's alone[1] is open.
    return min((both - alone[0]) / (alone[1] or 1), (both - alone[1]) / (alone[0] or 1))


def _entropy(counts: NDArray[np.int64] | Floats) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-np.sum(shares * np.log(shares)))


def _sigmoid(logits: Floats) -> Floats:
    probabilities: Floats = 1 / (1 + np.exp(-logits))
    return probabilities
