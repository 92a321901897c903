"""Turns scores on the test rows into the spread that another draw of such rows would show."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

REPLICATES = 200
MOST_ROWS = 1_000_000  # of a system; more than that would sharpen nothing that matters
LEVEL = 0.95


class Interval(NamedTuple):
    """A difference and where LEVEL of the replicates put it."""

    value: float
    low: float
    high: float


def replicates(scores_df: DataFrame, rows: int, seed: int) -> dict[str, NDArray[np.float64]]:
    """Return AUC and log loss of each system in REPLICATES redrawn sets of its rows.

    scores_df has (system, row_id, label, score), the same `rows` rows for every system. Each row
    counts Poisson(1) times (the bootstrap for large tables), equally often for every system, so
    that the replicates of two systems can be subtracted. More than MOST_ROWS rows are sampled by
    their ids. Returns [REPLICATES, 2] by system; Spark holds one system's rows in one task.
    """
    share = F.pmod(F.xxhash64(F.lit(f"bootstrap {seed}"), "row_id"), F.lit(1_000_000)) / 1e6
    sampled_df = scores_df if rows <= MOST_ROWS else scores_df.where(share < MOST_ROWS / rows)

    def redrawn(table: pd.DataFrame) -> pd.DataFrame:
        table = table.sort_values(["row_id", "label"], kind="stable")
        found = _replicates(table["label"].to_numpy(), table["score"].to_numpy(), seed)
        columns: dict[str, Any] = {"auc": found[:, 0], "logloss": found[:, 1]}
        columns |= {"system": table["system"].iloc[0], "replicate": np.arange(len(found))}
        return pd.DataFrame(columns)

    columns = sampled_df.select("system", "row_id", "label", "score")
    schema = "auc double, logloss double, system string, replicate int"
    made = columns.groupBy("system").applyInPandas(redrawn, schema).toPandas()
    return {
        str(system): part.sort_values("replicate")[["auc", "logloss"]].to_numpy()
        for system, part in made.groupby("system")
    }


def _replicates(labels: NDArray[Any], scores: NDArray[Any], seed: int) -> NDArray[np.float64]:
    """Return [REPLICATES, 2]: weighted AUC and log loss."""
    order = np.argsort(scores, kind="stable")
    ordered, positive = scores[order], labels[order] > 0.5
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])  # of each distinct score
    bounded = np.clip(ordered, 2.0**-52, 1 - 2.0**-52)
    losses = -np.log(np.where(positive, bounded, 1 - bounded))
    found = np.empty((REPLICATES, 2))
    for replicate in range(REPLICATES):
        # Drawn in the order of the row ids, which is the same for every system.
        weights = np.random.default_rng([seed % 2**32, replicate]).poisson(1.0, len(order))[order]
        positives = np.add.reduceat(weights * positive, starts)
        negatives = np.add.reduceat(weights * ~positive, starts)
        below = np.cumsum(negatives) - negatives
        pairs = positives.sum() * negatives.sum()
        auc = (positives * (below + negatives / 2)).sum() / pairs if pairs else np.nan
        found[replicate] = auc, losses @ weights / weights.sum() if weights.any() else np.nan
    return found


def difference(
    ours: Sequence[NDArray[np.float64]],
    theirs: Sequence[NDArray[np.float64]],
    metric: int,
    value: float,
) -> Interval:
    """Return the interval of a difference: the mean over the seeds of `ours` less that of `theirs`.

    metric is the column of the replicates (0 AUC, 1 log loss), value the difference on the rows as
    they are. Every replicate draws the seeds anew too, so that a difference which seeds alone can
    make is not taken for more; a single run says nothing of them.
    """
    draw = np.random.default_rng(0)
    spread = _over_seeds(ours, metric, draw) - _over_seeds(theirs, metric, draw)
    low, high = np.nanquantile(spread - np.nanmean(spread), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, value + float(low), value + float(high))


def _over_seeds(
    runs: Sequence[NDArray[np.float64]], metric: int, draw: np.random.Generator
) -> NDArray[np.float64]:
    """Return the mean over redrawn seeds [REPLICATES] of each replicate."""
    values = np.stack([run[:, metric] for run in runs])
    chosen = draw.integers(0, len(runs), values.shape)
    means: NDArray[np.float64] = np.take_along_axis(values, chosen, axis=0).mean(axis=0)
    return means
