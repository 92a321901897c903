"""Turns a table of labels and scores into metrics, in Spark, whatever its size."""

import itertools
import math
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from lc_spark.errors import LcSparkError

SMALLEST = 2.0**-52  # scores are kept this far from 0 and 1 in the log loss
ONE_CLASS = "The split to evaluate holds one class only: give it more rows."
PARTS = 16  # partitions that scores are sorted in


@dataclass(frozen=True)
class Metrics:
    """Quality of scores on a split.

    ne is log loss over the entropy of the split's own rate (He et al. 2014); calibration is
    predicted over observed; group_auc averages AUC over groups by their rows.
    """

    rows: int
    positives: int
    auc: float
    logloss: float
    ne: float
    calibration: float
    group_auc: float | None = None
    groups: int = 0
    groups_left_out: int = 0

    def as_floats(self) -> dict[str, float]:
        """Return the metrics that are defined, for MLflow."""
        return {key: float(value) for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Bucket:
    """Neighbouring scores taken together."""

    rows: int
    positives: int
    mean_score: float


def evaluate(scores_df: DataFrame, group: str | None = None) -> Metrics:
    """Return the metrics of (label, score[, group]) over all rows.

    Raises LcSparkError when the split has one class only, or a score is not in [0, 1].
    """
    found = evaluate_systems(scores_df.withColumn("system", F.lit("")), group)
    if not found:
        raise LcSparkError(ONE_CLASS)
    return found[""]


def evaluate_systems(scores_df: DataFrame, group: str | None = None) -> dict[str, Metrics]:
    """Return the metrics of each system in (system, label, score[, group]), in a few passes.

    Raises LcSparkError as evaluate does.
    """
    rows = (
        scores_df.groupBy("system")
        .agg(
            F.count("*").alias("rows"),
            F.sum("label").alias("positives"),
            F.sum("score").alias("predicted"),
            F.avg(_loss_column()).alias("logloss"),
            F.count_if(~F.coalesce(F.col("score").between(0, 1), F.lit(False))).alias("bad"),
        )
        .collect()
    )
    for row in rows:
        if not 0 < (row["positives"] or 0) < row["rows"]:
            raise LcSparkError(ONE_CLASS)
        if row["bad"]:
            raise LcSparkError(f"{row['bad']} scores are not in [0, 1]: training diverged.")
    aucs = exact_aucs(scores_df)
    groups = {} if group is None else _group_aucs(scores_df, group)
    found = {}
    for row in rows:
        rate = row["positives"] / row["rows"]
        entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
        group_auc, n_groups, left_out = groups.get(row["system"], (None, 0, 0))
        found[row["system"]] = Metrics(
            rows=int(row["rows"]),
            positives=int(row["positives"]),
            auc=aucs[row["system"]],
            logloss=float(row["logloss"]),
            ne=float(row["logloss"]) / entropy,
            calibration=float(row["predicted"]) / float(row["positives"]),
            group_auc=group_auc,
            groups=n_groups,
            groups_left_out=left_out,
        )
    return found


def log_loss(scores_df: DataFrame) -> float:
    """Return the log loss of (label, score) over all rows, in nats."""
    row = scores_df.agg(F.avg(_loss_column())).first()
    if row is None or row[0] is None:
        raise LcSparkError("There are no scores to evaluate.")
    return float(row[0])


def log_losses(scores_df: DataFrame) -> dict[str, float]:
    """Return the log loss of each system in (system, label, score), in nats."""
    rows = scores_df.groupBy("system").agg(F.avg(_loss_column()).alias("loss")).collect()
    return {row["system"]: float(row["loss"]) for row in rows}


def _loss_column() -> Column:
    bounded = F.greatest(F.lit(SMALLEST), F.least(F.lit(1 - SMALLEST), F.col("score")))
    return -F.log(F.when(F.col("label") == 1, bounded).otherwise(1 - bounded))


def exact_auc(scores_df: DataFrame) -> float:
    """Return the exact AUC of (label, score), a tie counting half."""
    return exact_aucs(scores_df.withColumn("system", F.lit("")))[""]


def exact_aucs(scores_df: DataFrame) -> dict[str, float]:
    """Return the exact AUC of each system in (system, label, score), a tie counting half.

    Scores are range-partitioned; each part counts its own pairs, and the pairs between parts come
    from their totals, so that no row leaves its partition for one place.
    """
    tied_df = scores_df.groupBy("system", "score").agg(
        F.sum("label").cast("long").alias("positives"),
        F.count_if(F.col("label") == 0).alias("negatives"),
    )
    parted_df = tied_df.repartitionByRange(PARTS, "system", "score").withColumn(
        "part", F.spark_partition_id()
    )
    by_score = Window.partitionBy("part", "system").orderBy("score")
    below = by_score.rowsBetween(Window.unboundedPreceding, -1)
    negatives_below = F.coalesce(F.sum("negatives").over(below), F.lit(0))
    # Twice the pairs, in decimals: doubles stop being exact at 2^53.
    pairs = F.col("positives").cast("decimal(19,0)") * (2 * negatives_below + F.col("negatives"))
    parts = (
        parted_df.withColumn("pairs", pairs)
        .groupBy("system", "part")
        .agg(F.sum("positives").alias("p"), F.sum("negatives").alias("n"), F.sum("pairs"))
        .orderBy("system", "part")
        .collect()
    )
    aucs = {}
    for system, its_parts in itertools.groupby(parts, key=lambda part: part["system"]):
        doubled = negatives = positives = 0
        for part in its_parts:
            doubled += int(part["sum(pairs)"]) + 2 * part["p"] * negatives
            positives += part["p"]
            negatives += part["n"]
        if positives * negatives == 0:
            raise LcSparkError(ONE_CLASS)
        aucs[str(system)] = doubled / (2 * positives * negatives)
    return aucs


def _group_aucs(scores_df: DataFrame, group: str) -> dict[str, tuple[float | None, int, int]]:
    """Return for each system AUC averaged over groups by rows, groups used, and those left out.

    Left out are groups with one class.
    """
    by_score = Window.partitionBy("system", group).orderBy("score")
    ties = Window.partitionBy("system", group, "score")
    middle_rank = F.rank().over(by_score) + (F.count("*").over(ties) - 1) / 2
    rank_sum = F.sum(F.when(F.col("label") == 1, F.col("rank")))
    p, n = F.sum("label"), F.count_if(F.col("label") == 0)
    groups_df = (
        scores_df.withColumn("rank", middle_rank)
        .groupBy("system", group)
        .agg(p.alias("p"), n.alias("n"), F.count("*").alias("rows"), rank_sum.alias("rank_sum"))
    )
    both = (F.col("p") > 0) & (F.col("n") > 0)
    auc = (F.col("rank_sum") - F.col("p") * (F.col("p") + 1) / 2) / (F.col("p") * F.col("n"))
    mean = F.sum(F.when(both, auc * F.col("rows"))) / F.sum(F.when(both, F.col("rows")))
    rows = (
        groups_df.groupBy("system")
        .agg(mean.alias("auc"), F.count_if(both).alias("n"), F.count_if(~both).alias("left_out"))
        .collect()
    )
    return {row["system"]: (row["auc"], int(row["n"]), int(row["left_out"])) for row in rows}


def score_buckets(scores_df: DataFrame, n: int) -> dict[str, list[Bucket]]:
    """Return for each system in (system, label, score) about n buckets of equal size, ascending."""
    shares = [i / n for i in range(1, n)]
    edges = F.percentile_approx("score", shares, 100_000).alias("edges")
    found = scores_df.groupBy("system").agg(edges).collect()
    edges_df = scores_df.sparkSession.createDataFrame(
        [(row["system"], sorted(set(row["edges"]))) for row in found],
        "system string, edges array<double>",
    )
    below = F.filter("edges", lambda edge: edge < F.col("score"))
    rows = (
        scores_df.join(F.broadcast(edges_df), "system")
        .groupBy("system", F.size(below).alias("bucket"))
        .agg(F.count("*").alias("rows"), F.sum("label").alias("p"), F.avg("score").alias("mean"))
        .orderBy("system", "bucket")
        .collect()
    )
    buckets: dict[str, list[Bucket]] = {}
    for row in rows:
        bucket = Bucket(int(row["rows"]), int(row["p"]), float(row["mean"]))
        buckets.setdefault(row["system"], []).append(bucket)
    return buckets


def roc_points(buckets: list[Bucket]) -> tuple[list[float], list[float]]:
    """Return false and true positive rates at the edges of the buckets, from (0, 0) to (1, 1)."""
    positives = sum(b.positives for b in buckets)
    negatives = sum(b.rows - b.positives for b in buckets)
    fpr, tpr = [0.0], [0.0]
    false_positives = true_positives = 0
    for bucket in reversed(buckets):
        true_positives += bucket.positives
        false_positives += bucket.rows - bucket.positives
        fpr.append(false_positives / negatives)
        tpr.append(true_positives / positives)
    return fpr, tpr
