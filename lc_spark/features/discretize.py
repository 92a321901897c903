"""Learns from the train rows how numbers become buckets or standardised values."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from lc_spark.errors import LcSparkError
from lc_spark.features.direct import direct_fields
from lc_spark.features.moments import moments
from lc_spark.features.prepare import FLOATS, number_column
from lc_spark.field_kinds import AnyField, Bucketed, Categorical, Continuous, Multivalued
from lc_spark.field_map import FieldInfo

ARRAYS = tuple(f"array<{name}>" for name in FLOATS)
SAMPLE_ROWS = 1_000_000  # rows that quantiles are computed on; their error is then below 0.1 %


def summary(
    train_df: DataFrame, fields: Sequence[AnyField], types: Mapping[str, str]
) -> dict[str, Any]:
    """Return what there is to know of the rows before any value is counted.

    rows; "min x", "max x", "mean x", "sd x" (over finite values) and "present x" of each numeric
    field x; "fraction x" of each field of values over fractional numbers: one that is not whole,
    or None.
    """
    wanted: list[Column] = [F.count("*").alias("rows")]
    number_fields = [f for f in fields if isinstance(f, Bucketed | Continuous)]
    infos = [
        FieldInfo(f.name, f.kind, 2, column=f.column, column_type=types[f.column])
        for f in number_fields
    ]
    here = direct_fields(train_df, infos)
    names = {info.name for info in here}
    for field in fields:
        if field.name in names:
            continue
        if isinstance(field, Bucketed | Continuous):
            finite = _finite_column(field.column)
            wanted += [
                F.min(finite).alias(f"min {field.name}"),
                F.max(finite).alias(f"max {field.name}"),
                F.mean(finite).alias(f"mean {field.name}"),
                F.stddev_pop(finite).alias(f"sd {field.name}"),
                F.count(number_column(field.column)).alias(f"present {field.name}"),
            ]
        elif isinstance(field, Categorical | Multivalued):
            if types[field.column] in FLOATS:
                number = _finite_column(field.column)
                number = F.when(number != F.floor(number), number)
            elif types[field.column] in ARRAYS:
                column = F.col(f"`{field.column}`")
                number = F.array_max(F.filter(column, lambda x: x != F.floor(x)))
            else:
                continue
            wanted.append(F.max(number).alias(f"fraction {field.name}"))
    row = train_df.select(*wanted).first()
    assert row is not None, "an aggregate has a row"
    return {**row.asDict(), **moments(train_df, here)}


def fit_numeric(
    train_df: DataFrame,
    found: Mapping[str, Any],
    fields: Sequence[Bucketed | Continuous],
    types: Mapping[str, str],
    seed: int,
) -> list[FieldInfo]:
    """Fit cut points (bucketed) and mean, sd, range (continuous) on rows with a row_id.

    found is their summary. Infinities count for no statistic. Quantiles are exact on at most
    SAMPLE_ROWS rows, chosen by a hash of the row id, so that the result does not depend on the
    partitioning.
    """
    quantiles = _quantiles(train_df, fields, found["rows"], seed)
    infos = []
    for field in fields:
        low, high, mean, sd = (
            found[f"{what} {field.name}"] for what in ("min", "max", "mean", "sd")
        )
        column_type = types[field.column]
        if isinstance(field, Continuous):
            if not math.isfinite(sd or 0.0):
                raise LcSparkError(
                    f"Field '{field.name}': the values of column '{field.column}', {low:g} to "
                    f"{high:g}, are too large for a mean and a deviation. If one of them stands "
                    "for a missing value, make it null in the source."
                )
            # Sums depend on the partitioning in their last digits, the fingerprint must not.
            infos.append(
                FieldInfo(
                    field.name,
                    "continuous",
                    size=2,
                    column=field.column,
                    column_type=column_type,
                    mean=_rounded_mean(mean or 0.0, sd or 0.0),
                    sd=_rounded(sd or 0.0) or 1.0,
                    low=low or 0.0,
                    high=high or 0.0,
                )
            )
        else:
            cuts = cut_points(field, low, high, quantiles.get(field.name) or [])
            infos.append(
                FieldInfo(
                    field.name,
                    "bucketed",
                    size=len(cuts) + 2,
                    column=field.column,
                    column_type=column_type,
                    cut_points=cuts,
                )
            )
    return infos


def _finite_column(name: str) -> Column:
    number = number_column(name)
    return F.when(F.abs(number) != math.inf, number)


def _rounded(value: float) -> float:
    return float(f"{value:.9g}")


def _rounded_mean(mean: float, sd: float) -> float:
    # Where positive and negative values cancel, every digit of the mean is rounding error.
    return round(mean, 6 - math.floor(math.log10(sd))) if sd else _rounded(mean)


def _quantiles(
    train_df: DataFrame, fields: Sequence[Bucketed | Continuous], n_rows: int, seed: int
) -> dict[str, list[float]]:
    by_quantile = [f for f in fields if isinstance(f, Bucketed) and f.by == "quantile"]
    if not by_quantile:
        return {}
    if n_rows > SAMPLE_ROWS:
        place = F.pmod(F.xxhash64(F.lit(f"quantiles {seed}"), "row_id"), F.lit(n_rows))
        train_df = train_df.where(place < SAMPLE_ROWS)
    columns = []
    for field in by_quantile:
        shares = [i / field.buckets for i in range(1, field.buckets)] or [0.5]
        columns.append(F.percentile(_finite_column(field.column), shares).alias(field.name))
    row = train_df.select(*columns).first()
    return row.asDict() if row else {}


def cut_points(
    field: Bucketed, low: float | None, high: float | None, quantiles: list[float]
) -> tuple[float, ...]:
    """Return ascending inner edges; bucket i holds cut_points[i-1] <= x < cut_points[i]."""
    if field.by == "cut_points":
        return field.cut_points
    if low is None or high is None or low == high or field.buckets == 1:
        return ()
    if field.by == "uniform":
        width = (high - low) / field.buckets
        cuts = [low + i * width for i in range(1, field.buckets)]
    elif field.by == "log_squared":
        # Criteo's usual floor(log(x)^2) above 2, and whole numbers below, as cut points.
        top = math.ceil(math.log(max(high, 2.0)) ** 2)
        cuts = [0.0, 1.0, 2.0, *(math.exp(math.sqrt(n)) for n in range(1, top + 1))]
        cuts = [cut for cut in cuts if cut <= high]
    else:
        cuts = quantiles
    # Equal quantiles are one edge; an edge at the minimum would leave an empty bucket below it.
    return tuple(sorted({cut for cut in cuts if cut > low}))


def refuse_fractions(found: Mapping[str, Any], fields: Sequence[Categorical | Multivalued]) -> None:
    """Raise LcSparkError for a field of values whose summary found fractional numbers."""
    for field in fields:
        example = found.get(f"fraction {field.name}")
        if example is not None:
            raise LcSparkError(
                f"Field '{field.name}' is {field.kind}, but column '{field.column}' holds "
                f"fractions such as {example}: make it bucketed or continuous, or cast it to "
                "a string."
            )
