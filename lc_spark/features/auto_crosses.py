"""Chooses the crosses that say more than their parents, from a seeded sample of the train rows.

The sample is read and coded once, and its codes (4 bytes a field and row) go to every executor;
each tries a share of the pairs, so no pair needs a shuffle or a job of its own, and the
partitioning of the rows changes nothing. How a pair is judged stands in cross_gain. The best one
joins the base, what is left is judged again over it, and so on: five crosses that say the same
are one.

A gain counts when it is more than the best of so many pairs would show by chance,
sqrt(2 ln pairs) standard errors, and when no fold loses. Rows are held out as the config splits
them: at random, or, where the split is by date, by blocks of days. A cross may know a day by heart,
and the rows of a day are one piece of luck, which the standard error does not see but a fold does.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from lc_spark.config import Config
from lc_spark.features.cross_gain import Base, Gain, cross_gain, fit_base, with_cross
from lc_spark.features.cross_sample import draw_sample
from lc_spark.field_kinds import AnyField, Crossed

log = logging.getLogger(__name__)

CROSSABLE = ("categorical", "bucketed")
PAIRS_A_TASK = 64  # a round of tasks takes about a second, and the time limit is kept that exactly
LEAST_ERRORS = 2.0  # standard errors that a gain must pass, however few pairs there are
Pair = tuple[str, str]


@dataclass(frozen=True)
class ChosenCross:
    """A pair of fields and its gain in held-out log loss, in nats a row, over the base.

    cells counts combinations with at least min_count rows of the sample, rows those judged.
    """

    of: Pair
    gain: float
    standard_error: float
    cells: int
    rows: int

    @property
    def cross(self) -> Crossed:
        """The pair as a field of the config."""
        return Crossed.model_validate({"kind": "crossed", "of": list(self.of)})


@dataclass(frozen=True)
class Choice:
    """The chosen crosses in the order they were chosen, each with its gain over those before.

    tried has every judged pair, best first, with its gain over the fields of the config alone;
    determined counts pairs of which one field determines the other, untried those left at the
    time limit.
    """

    chosen: list[ChosenCross] = field(default_factory=list)
    tried: list[ChosenCross] = field(default_factory=list)
    determined: int = 0
    untried: int = 0


def choose_crosses(train_df: DataFrame, config: Config) -> Choice:
    """Choose at most features.number pairs of categorical and bucketed fields.

    train_df has rows of ``raw``. Pairs that `fields` lists as crosses are left out. The same rows,
    config and seed give the same choice unless features.seconds cut it short, which the log says.
    Raises LcSparkError on an empty split.
    """
    settings = config.features
    until = time.monotonic() + settings.seconds
    pairs = candidate_pairs(config.fields)
    if not pairs:
        log.info("auto crosses: every pair of fields is listed already")
        return Choice()
    names, sample = draw_sample(train_df, config)
    log.info("auto crosses: %s pairs on %s train rows", f"{len(pairs):,}", f"{sample.label.size:,}")
    base = fit_base(sample)
    spark = train_df.sparkSession
    gains = judge_pairs(spark, base, names, _promising_first(pairs, names, base), until)
    tried = {pair: gain for pair, gain in gains.items() if gain is not None}
    untried = len(pairs) - len(gains)
    if untried:
        log.warning(
            "auto crosses: %s of %s pairs were not tried in %d s (features.seconds)",
            f"{untried:,}",
            f"{len(pairs):,}",
            settings.seconds,
        )
    errors = max(LEAST_ERRORS, math.sqrt(2 * math.log(len(pairs))))
    left = _beyond_chance(tried, errors)
    chosen: dict[Pair, Gain] = {}
    while left and len(chosen) < settings.number:
        best = _best_first(left)[0]
        chosen[best] = left.pop(best)
        if len(chosen) < settings.number and left:
            if time.monotonic() >= until:
                log.warning("auto crosses: no time to judge further pairs beside those chosen")
                break
            parents = [names.index(parent) for parent in best]
            base = fit_base(with_cross(base.sample, parents))
            # A pair that the time does not reach is out: its gain is over an older base.
            again = judge_pairs(spark, base, names, _best_first(left), until)
            left = {pair: gain for pair, gain in again.items() if gain is not None}
            left = _beyond_chance(left, errors)
    n = len(sample.label)
    return Choice(
        [_chosen_cross(pair, gain, n) for pair, gain in chosen.items()],
        [_chosen_cross(pair, tried[pair], n) for pair in _best_first(tried)],
        determined=len(gains) - len(tried),
        untried=untried,
    )


def candidate_pairs(fields: Sequence[AnyField]) -> list[Pair]:
    """Return the pairs of fields that can be crossed, less those that are, in config order."""
    names = [f.name for f in fields if f.kind in CROSSABLE]
    used = {f.name.lower() for f in fields}
    listed = [set(f.of) for f in fields if isinstance(f, Crossed)]
    return [
        (a, b)
        for a, b in combinations(names, 2)
        if {a, b} not in listed and f"{a}_x_{b}".lower() not in used
    ]


def judge_pairs(
    spark: SparkSession, base: Base, names: Sequence[str], pairs: Sequence[Pair], until: float
) -> dict[Pair, Gain | None]:
    """Judge pairs on the executors, in rounds until time.monotonic() has passed ``until``.

    Returns the gain, or None where one field determines the other, of every pair that was tried.
    """
    places = {name: i for i, name in enumerate(names)}
    shared = spark.sparkContext.broadcast((base, [(places[a], places[b]) for a, b in pairs]))

    def judge(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        here, at = shared.value
        for batch in batches:
            ids = batch.column(0).to_pylist()
            gains = [cross_gain(here, *at[i]) for i in ids]
            columns = [
                [gain and gain.mean for gain in gains],
                [gain and gain.standard_error for gain in gains],
                [gain and gain.worst_fold for gain in gains],
                [gain and gain.cells for gain in gains],
            ]
            types = (*[pa.float64()] * 3, pa.int64())
            arrays = [pa.array(c, t) for c, t in zip(columns, types, strict=True)]
            yield pa.RecordBatch.from_arrays([batch.column(0), *arrays], names=list(schema))

    schema = {"id": "long", "gain": "double", "error": "double", "worst": "double", "cells": "long"}
    tasks = spark.sparkContext.defaultParallelism
    gains: dict[Pair, Gain | None] = {}
    for start in range(0, len(pairs), PAIRS_A_TASK * tasks):
        if time.monotonic() >= until:
            break
        end = min(start + PAIRS_A_TASK * tasks, len(pairs))
        ids_df = spark.range(start, end, 1, tasks)
        ddl = ", ".join(f"{name} {kind}" for name, kind in schema.items())
        for row in ids_df.mapInArrow(judge, ddl).collect():
            judged = None if row["gain"] is None else Gain(*row[1:])
            gains[pairs[row["id"]]] = judged
        log.debug("auto crosses: %d of %d pairs", end, len(pairs))
    shared.destroy()
    return gains


def _promising_first(pairs: Sequence[Pair], names: Sequence[str], base: Base) -> list[Pair]:
    """Order pairs by how much their fields say alone, for the case that the time is too short."""
    sample = base.sample
    rate = sample.label.mean()
    strength = {}
    # Behind the named fields lie the listed crosses.
    for name, codes, size in zip(names, sample.codes, sample.sizes, strict=False):
        rows = np.bincount(codes, minlength=size)
        excess = np.bincount(codes, sample.label - rate, size) ** 2 / rows
        # Chi-squared less its degrees of freedom: what cardinality alone gives is no strength.
        strength[name] = max(float(excess.sum() / (rate * (1 - rate) or 1)) - size + 1, 0.0)
    return sorted(pairs, key=lambda pair: -strength[pair[0]] - strength[pair[1]])


def _beyond_chance(gains: dict[Pair, Gain], errors: float) -> dict[Pair, Gain]:
    return {
        pair: g
        for pair, g in gains.items()
        if g.mean > errors * g.standard_error and g.worst_fold > 0
    }


def _best_first(gains: dict[Pair, Gain]) -> list[Pair]:
    # Rounded: sums may differ in their last digits with the order of equal row ids.
    return sorted(gains, key=lambda pair: (-round(gains[pair].mean, 12), pair))


def _chosen_cross(pair: Pair, gain: Gain, rows: int) -> ChosenCross:
    return ChosenCross(pair, gain.mean, gain.standard_error, gain.cells, rows)
