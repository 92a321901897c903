"""Estimates from a sample of rows how many values of a field all rows will have often enough.

A value's count in the sample is Poisson of a rate of its own. The rates of the values that are not
frequent are taken to have a power-law density between two bounds, as values by Zipf's law have
(the finite Zipf-Mandelbrot model of Evert, 2004, "A simple LNRE model for random character
sequences", JADT; here with any exponent). Exponent and bounds are averaged by the likelihood that
they give to the numbers of values seen once, twice, ... in the sample. Values seen more often than
that speak for themselves, as Chao and Lee (1992, JASA 87(417)) have it.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RARE = 10  # values seen at most so often are modelled
RATES = 80  # of the grid, evenly spaced by their logarithms
EXPONENTS = np.arange(-1.0, 3.01, 0.125)
LEAST_ROWS = 0.01  # of all rows: values that are rarer do not show in the sample

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number of values, with the bounds that hold it with a probability of 90 %."""

    value: float
    low: float
    high: float


def often_enough(counts: NDArray[np.int64], times: float, min_count: int) -> Estimate:
    """Estimate how many values occur at least min_count times in `times` as many rows.

    counts int64 [n] are those of the distinct values of a sample drawn at random from the rows.
    The bounds say how sure the model is of its own parameters, not whether it is right.
    """
    if times <= 1 or len(counts) == 0:
        exact = float((counts >= min_count).sum())
        return Estimate(exact, exact, exact)
    frequent = counts[counts > RARE]
    certain = float(_tail(min_count - frequent, (times - 1) * frequent).sum())
    seen = np.bincount(counts[counts <= RARE], minlength=RARE + 1)[1:].astype(np.float64)
    if not seen.any():
        return Estimate(certain, certain, certain)
    log_rates = np.linspace(math.log(LEAST_ROWS / times), math.log(3.0 * RARE), RATES)
    rates = np.exp(log_rates)
    k = np.arange(RARE + 1)
    chance = _poisson(k[:, None], rates)  # [k, rate] of a count in the sample
    reach = _tail(min_count - k[:, None], (times - 1) * rates)  # of enough in all rows, given it
    unseen, rest = chance[0] * reach[0], seen.sum()
    # What is seen k times, by rate: k = 1 .. RARE; with what becomes of it.
    becomes = chance[1:] * reach[1:]
    logs, values = [], []
    for exponent in EXPONENTS:
        density = np.exp(-exponent * (log_rates - log_rates[0]))
        # Sums over rates between two bounds are differences of running sums.
        probability = _between(chance[1:] * density)  # [k, low, high]
        total = probability.sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            log_likelihood = np.einsum("k,kij->ij", seen, np.log(probability / total))
            new = rest * _between(unseen[None] * density)[0] / total
            known = np.einsum("k,kij->ij", seen, _between(becomes * density) / probability)
        ok = np.triu(np.ones_like(total, dtype=bool)) & np.isfinite(log_likelihood)
        ok &= np.isfinite(new) & np.isfinite(known)
        logs.append(log_likelihood[ok])
        values.append((new + known)[ok])
    log_likelihood, found = np.concatenate(logs), np.concatenate(values)
    weights = np.exp(log_likelihood - log_likelihood.max())
    weights /= weights.sum()
    order = np.argsort(found)
    running = np.cumsum(weights[order])
    bounds = found[order][np.minimum(np.searchsorted(running, [0.05, 0.5, 0.95]), len(order) - 1)]
    return Estimate(certain + bounds[1], certain + bounds[0], certain + bounds[2])


def _between(columns: Floats) -> Floats:
    """Return sums over rates i .. j for all i <= j: [k, rate] -> [k, rate, rate]."""
    running = np.cumsum(columns, axis=1)
    before = running - columns
    return running[:, None, :] - before[:, :, None]


def _poisson(k: NDArray[np.int64], mean: Floats) -> Floats:
    log_factorial = np.array([math.lgamma(i + 1.0) for i in np.ravel(k)]).reshape(k.shape)
    chance: Floats = np.exp(k * np.log(mean) - mean - log_factorial)
    return chance


def _tail(least: NDArray[np.int64], mean: Floats) -> Floats:
    """Return the probability that a Poisson variable is at least so much."""
    least, mean = np.broadcast_arrays(least, mean)
    below = np.zeros(mean.shape)
    for i in range(max(int(least.max(initial=0)), 0)):
        term = np.exp(i * np.log(mean) - mean - math.lgamma(i + 1.0))
        below += np.where(i < least, term, 0.0)
    tail: Floats = np.clip(1.0 - below, 0.0, 1.0)
    return tail
