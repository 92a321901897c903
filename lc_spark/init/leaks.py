"""Turns a labelled sample into how well each column alone tells the label: AUC and log loss."""

import math
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame, Row, Window
from pyspark.sql import functions as F

LABEL, FOLD = "__label", "__fold"  # columns of the sample: 0.0 or 1.0; 0 .. FOLDS - 1
FOLDS = 5


@dataclass(frozen=True)
class Alone:
    """What one column says of the label; loss_share is log loss over the label's entropy."""

    auc: float
    loss_share: float


def fold_column(seed: int) -> Column:
    """Return a seeded fold a row, 0 .. FOLDS - 1."""
    return F.floor(F.rand(seed) * FOLDS).cast("int").alias(FOLD)


def alone(
    sample_df: DataFrame, keys: dict[str, Column], numbers: dict[str, Column]
) -> dict[str, Alone]:
    """Return for each column the better of two scores: rates by key, and the number itself.

    keys: column -> int64 that stands for its value, null for a missing one. A row's score is the
    rate of positives among the rows with the same key in the *other* folds, drawn towards the mean
    as by one more row. So a column of many values, each seen once, scores .5 and not 1.
    numbers: column -> double, null for missing; ranked as it is, upwards or downwards.
    sample_df carries LABEL and FOLD. One Spark job, whatever the number of columns.
    """
    if not keys:
        return {}
    total = sample_df.agg(F.avg(LABEL)).first()
    rate = total[0] if total is not None else None
    if not rate or rate == 1:
        return {}
    scored_df = _rates(sample_df, list(keys.values()), rate)
    if numbers:
        scored_df = scored_df.unionByName(_values(sample_df, list(numbers.values())))
    rows = {(row["rated"], row["column"]): row for row in _by_column(scored_df).collect()}
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    places = {name: i for i, name in enumerate(numbers)}
    found = {}
    for i, name in enumerate(keys):
        row = rows[True, i]
        auc = _auc(row)
        if name in places:
            upwards = _auc(rows[False, places[name]])
            auc = max(auc, upwards, 1 - upwards)
        found[name] = Alone(auc, row["loss"] / (row["p"] + row["n"]) / entropy)
    return found


def _auc(row: Row) -> float:
    return float(row["pairs"] / (row["p"] * row["n"]))


def _long(sample_df: DataFrame, columns: list[Column], name: str) -> DataFrame:
    """Return a line for each row and column: its place, the value as ``name``, LABEL, FOLD."""
    entries = [F.struct(F.lit(i).alias("column"), c.alias(name)) for i, c in enumerate(columns)]
    exploded_df = sample_df.select(LABEL, FOLD, F.explode(F.array(*entries)).alias("entry"))
    return exploded_df.select(LABEL, FOLD, "entry.column", f"entry.{name}")


def _rates(sample_df: DataFrame, keys: list[Column], rate: float) -> DataFrame:
    counted_df = (
        _long(sample_df, keys, "key")
        .groupBy("column", "key", FOLD)
        .agg(F.sum(LABEL).alias("p"), F.count("*").alias("rows"))
    )
    same_key = Window.partitionBy("column", "key")
    others_p = F.sum("p").over(same_key) - F.col("p")
    others = F.sum("rows").over(same_key) - F.col("rows")
    return counted_df.select(
        F.lit(True).alias("rated"),
        "column",
        ((others_p + rate) / (others + 1)).alias("score"),
        "p",
        (F.col("rows") - F.col("p")).alias("n"),
    )


def _values(sample_df: DataFrame, numbers: list[Column]) -> DataFrame:
    return (
        _long(sample_df, numbers, "value")
        .groupBy("column", F.coalesce("value", F.lit(-math.inf)).alias("score"))
        .agg(F.sum(LABEL).alias("p"), F.sum(1 - F.col(LABEL)).alias("n"))
        .select(F.lit(False).alias("rated"), "column", "score", "p", "n")
    )


def _by_column(scored_df: DataFrame) -> DataFrame:
    """Return positives, negatives, ordered pairs (a tie counts half) and log loss by column."""
    tied_df = scored_df.groupBy("rated", "column", "score").agg(
        F.sum("p").alias("p"), F.sum("n").alias("n")
    )
    below = Window.partitionBy("rated", "column").orderBy("score")
    n_below = F.coalesce(
        F.sum("n").over(below.rowsBetween(Window.unboundedPreceding, -1)), F.lit(0.0)
    )
    loss = -(F.col("p") * F.log("score") + F.col("n") * F.log(1 - F.col("score")))
    return (
        tied_df.withColumn("pairs", F.col("p") * (n_below + F.col("n") / 2))
        .withColumn("loss", F.when(F.col("rated"), loss))
        .groupBy("rated", "column")
        .agg(*[F.sum(c).alias(c) for c in ("p", "n", "pairs", "loss")])
    )
