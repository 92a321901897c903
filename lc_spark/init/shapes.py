"""Turns a sample of rows into the shapes of its columns: quantiles, lists in text, leaks."""

import dataclasses

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from lc_spark.init import leaks
from lc_spark.init.columns import ColumnProfile, number_of, quoted, value_of

DELIMITERS = ("|", ";", ",")
DELIMITED_SHARE = 0.3  # of the rows, before a text is looked at as a list
REPEATS = 3  # how often a value of a list must come on average
LONGEST_VALUE = 30  # characters of a value of a list, on average
MOST_CODES = 1000  # distinct whole numbers that are judged one by one
SHARES = [i / 100 for i in range(1, 100)]


def with_shapes(sample_df: DataFrame, columns: list[ColumnProfile]) -> list[ColumnProfile]:
    """Add quantiles and skewness of numbers, leading zeros of codes: one pass over the sample."""
    numbers = [c for c in columns if c.holds == "number"]
    if not numbers:
        return columns
    wanted = []
    for i, column in enumerate(numbers):
        number = number_of(column)
        code = F.col(quoted(column.name)).cast("string").rlike("^0[0-9]")
        wanted += [
            F.percentile_approx(number, SHARES, 2000).alias(f"{i} quantiles"),
            F.skewness(number).alias(f"{i} skewness"),
            F.coalesce(F.bool_or(code), F.lit(False)).alias(f"{i} code"),
        ]
    row = sample_df.agg(*wanted).first()
    assert row is not None, "an aggregate without keys has one row"
    found = {
        column.name: dataclasses.replace(
            column,
            quantiles=tuple(row[f"{i} quantiles"] or ()),
            skewness=row[f"{i} skewness"] or 0.0,
            leading_zeros=row[f"{i} code"],
        )
        for i, column in enumerate(numbers)
    }
    return [found.get(c.name, c) for c in columns]


def with_lists(sample_df: DataFrame, columns: list[ColumnProfile]) -> list[ColumnProfile]:
    """Find the texts that are lists of short values that come again, and size up the arrays."""
    candidates: list[tuple[ColumnProfile, str | None]] = [
        (column, None) for column in columns if column.holds == "array"
    ]
    candidates += _frequent_delimiters(sample_df, [c for c in columns if c.holds == "text"])
    if not candidates:
        return columns
    lists = [
        F.struct(F.lit(i).alias("i"), _list(c, d).alias("list"))
        for i, (c, d) in enumerate(candidates)
    ]
    value = F.trim("value")
    lists_df = sample_df.select(F.explode(F.array(*lists)).alias("entry")).select("entry.*")
    values_df = lists_df.select("i", F.size("list").alias("size"), F.explode("list").alias("value"))
    rows = values_df.groupBy("i").agg(
        F.count("*").alias("values"),
        F.approx_count_distinct(value).alias("distinct"),
        F.avg(F.length(value)).alias("length"),
        F.max("size").alias("most"),
        F.bool_and(value.rlike("^[0-9]*$")).alias("digits"),
    )
    found = {}
    for row in rows.collect():
        column, delimiter = candidates[row["i"]]
        # 3,14 is a number with a decimal comma, and "Oslo, Norway" one value.
        pairs = delimiter == "," and row["most"] < 3
        repeats = row["distinct"] * REPEATS <= row["values"] and row["distinct"] < column.distinct
        if delimiter is None or (repeats and row["length"] <= LONGEST_VALUE and not pairs):
            found[column.name] = dataclasses.replace(
                column, delimiter=delimiter, values=row["distinct"], most_values=row["most"]
            )
    return [found.get(c.name, c) for c in columns]


def _list(column: ColumnProfile, delimiter: str | None) -> Column:
    if delimiter is None:
        return F.col(quoted(column.name)).cast("array<string>")
    return F.split(value_of(column), f"[{delimiter}]", -1)


def _frequent_delimiters(
    sample_df: DataFrame, texts: list[ColumnProfile]
) -> list[tuple[ColumnProfile, str]]:
    """Return text columns with the delimiters that enough of their values hold: one pass."""
    pairs = [(c, d) for c in texts for d in DELIMITERS]
    if not pairs:
        return []
    row = sample_df.agg(*[F.avg(value_of(c).contains(d).cast("double")) for c, d in pairs]).first()
    assert row is not None, "an aggregate without keys has one row"
    return [pair for pair, share in zip(pairs, row, strict=True) if (share or 0) >= DELIMITED_SHARE]


def with_leaks(sample_df: DataFrame, columns: list[ColumnProfile]) -> list[ColumnProfile]:
    """Add how well each column alone tells the label."""
    judged = [
        c for c in columns if c.holds not in ("date", "other") and not c.unique and c.distinct
    ]
    numbers = {c.name: number_of(c) for c in judged if c.holds == "number"}
    alone = leaks.alone(sample_df, {c.name: _key(c) for c in judged}, numbers)
    return [dataclasses.replace(c, alone=alone.get(c.name)) for c in columns]


def _key(column: ColumnProfile) -> Column:
    """Return int64 for a value: its bucket of a number with many values, else its hash."""
    edges = sorted(set(column.quantiles))
    if column.holds == "number" and (column.fractions or column.distinct > MOST_CODES):
        above = F.filter(F.array(*map(F.lit, edges)), lambda edge: edge <= number_of(column))
        return F.when(number_of(column).isNotNull(), F.size(above).cast("long"))
    value = value_of(column)
    return F.when(value.isNotNull(), F.xxhash64(value))
