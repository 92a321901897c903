"""Turns rows into what each column holds: one pass for all counts, one for what may be an id."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

from pyspark.sql import Column, DataFrame, Row
from pyspark.sql import functions as F
from pyspark.sql import types as T

from lc_spark.features.prepare import CATEGORICAL_TYPES, FLOATS
from lc_spark.init import leaks

NUMBER = r"^\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*$"
DAY = r"^\s*[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([T ].*)?$"
# A sketch of 2^12 counters: one buffer a column, where approx_count_distinct takes hundreds.
SKETCH, DISTINCT_ERROR = 12, 0.02
MOST_IDS = 5  # columns that are counted exactly, to see whether each row has its own value

Holds = Literal["number", "text", "boolean", "date", "array", "other"]


@dataclass(frozen=True)
class ColumnProfile:
    """What a column holds; ``holds`` is number or date for text that all reads as one.

    distinct is approximate (2 %) unless unique. quantiles (1 % to 99 %), skewness, leading_zeros,
    length, delimiter, values (distinct ones in lists), most_values (in a row) and alone are of the
    sample.
    """

    name: str
    type: str
    holds: Holds
    missing: int
    distinct: int
    unique: bool = False
    low: float | None = None
    high: float | None = None
    fractions: bool = False
    odd_text: int = 0  # of text: rows that read as no number
    quantiles: tuple[float, ...] = ()
    skewness: float = 0.0
    leading_zeros: bool = False
    delimiter: str | None = None
    values: int = 0
    most_values: int = 0
    alone: leaks.Alone | None = None


def quoted(name: str) -> str:
    """Return a column's name in backticks."""
    return f"`{name}`"


def _holds(column_type: T.DataType) -> Holds:
    if isinstance(column_type, T.NumericType):
        return "number"
    if isinstance(column_type, T.DateType | T.TimestampType | T.TimestampNTZType):
        return "date"
    if isinstance(column_type, T.ArrayType):
        element = column_type.elementType.simpleString()
        return "array" if element in CATEGORICAL_TYPES and element not in FLOATS else "other"
    names: dict[str, Holds] = {"string": "text", "boolean": "boolean"}
    return names.get(column_type.simpleString(), "other")


def sql_name(name: str) -> str:
    """Return a column's name as SQL, in backticks only where it needs them."""
    # Words that SQL reads as a value where a column of that name is meant.
    value = re.fullmatch("true|false|null|user|(current|session|local).*", name.lower())
    return name if re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name) and not value else quoted(name)


def number_of(column: ColumnProfile) -> Column:
    """Return a column's finite numbers as double, else null."""
    number = F.col(quoted(column.name)).try_cast("double")
    return F.when(~F.isnan(number) & (F.abs(number) != float("inf")), number)


def value_of(column: ColumnProfile) -> Column:
    """Return a column's values, null for null, NaN, the empty string and the empty array."""
    value = F.col(quoted(column.name))
    if column.holds == "array":
        return F.when(F.size(value) > 0, value)
    if column.type in FLOATS:
        return F.when(~F.isnan(value), value)
    return F.nullif(value, F.lit("")) if column.type == "string" else value


def counted(rows_df: DataFrame) -> list[ColumnProfile]:
    """Count rows, missing and distinct values, text that is no number or date: one pass."""
    empty = [
        ColumnProfile(f.name, f.dataType.simpleString(), _holds(f.dataType), 0, 0)
        for f in rows_df.schema.fields
    ]
    wanted: list[Column] = [F.count("*").alias("rows")]
    for i, column in enumerate(empty):
        if column.holds == "other":
            continue
        value, number = value_of(column), number_of(column)
        # xxhash64 of null is a number too.
        hashed = F.when(value.isNotNull(), F.xxhash64(value))
        wanted += [
            F.count(value).alias(f"{i} present"),
            F.hll_sketch_estimate(F.hll_sketch_agg(hashed, SKETCH)).alias(f"{i} distinct"),
        ]
        if column.holds in ("number", "text"):
            wanted += [F.min(number).alias(f"{i} low"), F.max(number).alias(f"{i} high")]
            whole = number == F.floor(number)
            wanted.append(F.count_if(~whole).alias(f"{i} fractions"))
        if column.holds == "text":
            no_number = ~value.rlike(NUMBER) & (F.lower(F.trim(value)) != "nan")
            no_day = ~value.rlike(DAY) | value.try_cast("date").isNull()
            wanted += [
                F.count_if(no_number).alias(f"{i} odd"),
                F.count_if(no_day).alias(f"{i} no day"),
            ]
    row = rows_df.agg(*wanted).first()
    assert row is not None, "an aggregate without keys has one row"
    return [_read_counts(column, i, row) for i, column in enumerate(empty)]


def _read_counts(column: ColumnProfile, i: int, row: Row) -> ColumnProfile:
    if column.holds == "other":
        return column
    present, holds = row[f"{i} present"], column.holds
    if holds == "text" and present:
        holds = "number" if not row[f"{i} odd"] else "date" if not row[f"{i} no day"] else "text"
    counted = dataclasses.replace(
        column, holds=holds, missing=row["rows"] - present, distinct=row[f"{i} distinct"]
    )
    if column.holds not in ("number", "text"):
        return counted
    return dataclasses.replace(
        counted,
        low=row[f"{i} low"],
        high=row[f"{i} high"],
        fractions=row[f"{i} fractions"] > 0,
        odd_text=row[f"{i} odd"] if column.holds == "text" else 0,
    )


def with_unique(
    rows_df: DataFrame, columns: list[ColumnProfile], n_rows: int
) -> list[ColumnProfile]:
    """Mark the columns in which every row has a value of its own, by an exact count of few."""
    like_ids = [
        c
        for c in columns
        if c.holds in ("number", "text")
        and not c.fractions
        and not c.missing
        and c.distinct >= n_rows * (1 - 5 * DISTINCT_ERROR)
    ][:MOST_IDS]
    if not like_ids:
        return columns
    exact = rows_df.agg(*[F.count_distinct(quoted(c.name)) for c in like_ids]).first()
    assert exact is not None, "an aggregate without keys has one row"
    unique = {c.name for c, n in zip(like_ids, exact, strict=True) if n == n_rows}
    return [
        dataclasses.replace(c, unique=True, distinct=n_rows) if c.name in unique else c
        for c in columns
    ]
