"""Turns a table of raw rows into a Profile: what each column holds, in a few passes over it."""

import datetime
import logging
import re
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from lc_spark.errors import LcSparkError, nearest
from lc_spark.features.prepare import FLOATS, text_column
from lc_spark.init import leaks
from lc_spark.init.columns import NUMBER, ColumnProfile, counted, quoted, sql_name, with_unique
from lc_spark.init.shapes import with_leaks, with_lists, with_shapes
from lc_spark.sources import CORRUPT

log = logging.getLogger("lc_spark")

SAMPLE_ROWS = 100_000  # rows that shapes and leaks are judged on
SAMPLE_CELLS = 2_000_000  # fewer rows of a table with many columns
MOST_DAYS = 1500  # of more, each would be a small partition of the table 'raw'
MOST_MISSING_DATES = 0.02  # rows without a day are set aside: no column that costs more


@dataclass(frozen=True)
class Label:
    """The label's SQL expression, and how often it is 1, 0 or missing."""

    column: str
    expression: str
    positive: str
    negative: str
    positives: int
    negatives: int
    missing: int


@dataclass(frozen=True)
class Day:
    """The usable rows of one day."""

    day: datetime.date
    rows: int
    positives: int


@dataclass(frozen=True)
class Profile:
    """A table: its label, its other columns, and the days of the column that names a row's day."""

    rows: int
    corrupt: int
    label: Label
    columns: tuple[ColumnProfile, ...]
    date: str | None = None
    days: tuple[Day, ...] = ()


def profile(source_df: DataFrame, label_name: str, seed: int = 0) -> Profile:
    """Look at a table in at most four passes over it and three over a seeded sample of it.

    Raises LcSparkError when the label is missing or has not two values, or a name cannot be used.
    """
    _check_names(source_df, label_name)
    log.info("init: counting the values of the label '%s'", label_name)
    label, corrupt = _label(source_df, label_name)
    rows_df = source_df
    if CORRUPT in source_df.columns:
        rows_df = source_df.where(F.col(CORRUPT).isNull()).drop(CORRUPT)
    n_rows = label.positives + label.negatives + label.missing
    log.info(
        "init: one pass over %s rows for the counts of %d columns",
        f"{n_rows:,}",
        len(rows_df.columns) - 1,
    )
    columns = with_unique(rows_df, counted(rows_df.drop(label_name)), n_rows)
    sample_df = _sample(rows_df, label, n_rows, len(columns), seed).persist()
    log.info("init: a sample of %s rows for shapes, lists and leaks", f"{sample_df.count():,}")
    columns = with_lists(sample_df, with_shapes(sample_df, columns))
    columns = with_leaks(sample_df, columns)
    sample_df.unpersist()
    date = _date(columns, n_rows)
    days = _days(rows_df, label, date) if date else ()
    return Profile(n_rows + corrupt, corrupt, label, tuple(columns), date, days)


def _check_names(source_df: DataFrame, label_name: str) -> None:
    names = [c for c in source_df.columns if c != CORRUPT]
    if label_name not in names:
        raise LcSparkError(
            f"The table has no column '{label_name}' for the label.{nearest(label_name, names)} "
            f"It has: {', '.join(names)}"
        )
    ticked = [name for name in names if "`" in name]
    if ticked:
        raise LcSparkError(
            f"The column '{ticked[0]}' has a backtick in its name, which SQL cannot quote: rename "
            "it in the source."
        )


def _label(source_df: DataFrame, name: str) -> tuple[Label, int]:
    """Return the label and the number of lines that do not parse."""
    type_name = source_df.schema[name].dataType.simpleString()
    corrupt = F.col(CORRUPT).isNotNull() if CORRUPT in source_df.columns else F.lit(False)
    value = F.when(~corrupt, text_column(F.col(quoted(name)), type_name))
    groups = (
        source_df.groupBy(corrupt.alias("corrupt"), value.alias("value"))
        .count()
        .orderBy(F.desc("corrupt"), F.col("value").isNotNull(), F.desc("count"), "value")
        .limit(12)
        .collect()
    )
    n_corrupt = sum(row["count"] for row in groups if row["corrupt"])
    good = [row for row in groups if not row["corrupt"]]
    missing = sum(row["count"] for row in good if row["value"] is None)
    found = [(row["value"], row["count"]) for row in good if row["value"] is not None]
    if len(found) != 2:
        some = ", ".join(repr(value) for value, _ in found[:9])
        number = "more than 9 values" if len(found) > 9 else f"{len(found)} value(s)"
        raise LcSparkError(
            f"The label must have two values, but column '{name}' has {number} ({some or 'none'}):"
            " name another column, or add one of 0 and 1 to the source."
        )
    expression, positive, negative = _label_expression(name, type_name, *found)
    counts = dict(found)
    return (
        Label(name, expression, positive, negative, counts[positive], counts[negative], missing),
        n_corrupt,
    )


def _label_expression(
    name: str, type_name: str, one: tuple[str, int], other: tuple[str, int]
) -> tuple[str, str, str]:
    """Return SQL, the value that it makes 1 and the one that it makes 0."""
    plain = sql_name(name)
    for positive, negative in ((one[0], other[0]), (other[0], one[0])):
        if positive.lower() == "true" and negative.lower() == "false":
            return plain, positive, negative
        numbers = all(re.match(NUMBER, value) for value in (positive, negative))
        if numbers and (float(positive), float(negative)) == (1.0, 0.0):
            return plain, positive, negative
    by_count = sorted((one, other), key=lambda found: (-found[1], found[0]))
    negative, positive = by_count[0][0], by_count[1][0]  # the rarer one is what one looks for
    if type_name == "string":
        escaped = positive.replace("\\", "\\\\").replace("'", "\\'")
        return f"nullif({plain}, '') = '{escaped}'", positive, negative
    if type_name in FLOATS:
        # NaN is a value to SQL: without nullif it would count as negative.
        return f"nullif({plain}, double('NaN')) = {positive}", positive, negative
    return f"cast({plain} AS STRING) = '{positive}'", positive, negative


def _label_column(label: Label) -> Column:
    """Return the label as 1.0, 0.0 or null, as ingest reads it."""
    found = F.expr(label.expression)
    as_boolean = found.cast("string").try_cast("boolean").cast("double")
    number = F.coalesce(found.try_cast("double"), as_boolean)
    return F.when(~F.isnan(number), number)


def _sample(rows_df: DataFrame, label: Label, n_rows: int, n_columns: int, seed: int) -> DataFrame:
    """Return a seeded sample of rows with a label, as leaks.alone takes it."""
    wanted = min(SAMPLE_ROWS, max(SAMPLE_ROWS // 10, SAMPLE_CELLS // max(n_columns, 1)))
    if n_rows > wanted:
        rows_df = rows_df.sample(wanted / n_rows, seed)
    return rows_df.select(
        "*", _label_column(label).alias(leaks.LABEL), leaks.fold_column(seed)
    ).where(F.col(leaks.LABEL).isNotNull())


def _date(columns: list[ColumnProfile], n_rows: int) -> str | None:
    """Return the column that names a row's day: the one with the fewest missing, best-named."""
    dates = [c for c in columns if c.holds == "date" and c.missing <= n_rows * MOST_MISSING_DATES]
    names = ("date", "day", "time", "timestamp", "ts")
    dates.sort(key=lambda c: (c.missing, c.name.lower() not in names))
    return dates[0].name if dates else None


def _days(rows_df: DataFrame, label: Label, date: str) -> tuple[Day, ...]:
    """Return the rows with a label by day, in order."""
    log.info("init: one pass for the days of '%s'", date)
    labelled_df = rows_df.select(
        F.expr(f"try_cast({quoted(date)} AS DATE)").alias("day"),
        _label_column(label).alias("label"),
    ).dropna()
    by_day_df = labelled_df.groupBy("day").agg(F.count("*"), F.sum("label").cast("long"))
    return tuple(Day(*row) for row in by_day_df.orderBy("day").limit(MOST_DAYS + 1).collect())
