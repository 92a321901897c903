"""Metrics equal scikit-learn's on the same scores, ties and all."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from sklearn.metrics import log_loss, roc_auc_score, roc_curve

from lc_spark import metrics
from lc_spark.errors import LcSparkError
from lc_spark.metrics import Bucket

CLOSE = 1e-9


def frame(spark: SparkSession, labels: ArrayLike, scores: ArrayLike) -> DataFrame:
    table = pd.DataFrame({"label": np.asarray(labels, np.float32), "score": scores})
    return spark.createDataFrame(table, "label float, score double")


def drawn(n: int, seed: int, decimals: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return labels and scores that tell something about them, rounded to make ties."""
    random = np.random.default_rng(seed)
    scores = np.clip(random.beta(2, 5, n), 1e-6, 1 - 1e-6).round(decimals)
    return (random.random(n) < scores).astype(int), scores


@pytest.mark.parametrize(
    ("some_labels", "some_scores"),
    [
        drawn(3000, 1, 12),  # no ties
        drawn(3000, 2, 1),  # hardly anything but ties
        drawn(200_000, 3, 4),
        ([0, 1, 1, 0], [0.5, 0.5, 0.5, 0.5]),
        ([0, 1, 1, 0], [0.0, 1.0, 0.0, 1.0]),
        ([0, 0, 1, 1], [0.9, 0.8, 0.2, 0.1]),
        ([0, 1], [0.0, 1.0]),
        ([1, 0, 1], [5e-324, 0.0, 1 - 2**-53]),
    ],
    ids=["distinct", "ties", "large", "equal", "extreme", "reversed", "two", "edge"],
)
def test_metrics_equal_scikit_learn(
    spark: SparkSession, some_labels: ArrayLike, some_scores: ArrayLike
) -> None:
    labels, scores = np.asarray(some_labels), np.asarray(some_scores)
    found = metrics.evaluate(frame(spark, labels, scores))
    rate = labels.mean()
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    assert found.rows == len(labels)
    assert found.positives == labels.sum()
    assert found.auc == pytest.approx(roc_auc_score(labels, scores), abs=CLOSE)
    assert found.logloss == pytest.approx(log_loss(labels, scores), abs=CLOSE)
    assert found.ne == pytest.approx(log_loss(labels, scores) / entropy, abs=CLOSE)
    assert found.calibration == pytest.approx(scores.sum() / labels.sum(), abs=CLOSE)
    assert found.group_auc is None
    assert "group_auc" not in found.as_floats()


def test_metrics_of_four_rows_by_hand(spark: SparkSession) -> None:
    found = metrics.evaluate(frame(spark, [1, 0, 1, 0], [0.8, 0.6, 0.6, 0.2]))
    # Pairs (positive, negative): .8 > .6, .8 > .2, .6 = .6, .6 > .2.
    assert found.auc == pytest.approx(3.5 / 4, abs=CLOSE)
    expected = -(math.log(0.8) + math.log(0.4) + math.log(0.6) + math.log(0.8)) / 4
    assert found.logloss == pytest.approx(expected, abs=CLOSE)
    assert found.ne == pytest.approx(expected / math.log(2), abs=CLOSE)
    assert found.calibration == pytest.approx(2.2 / 2, abs=CLOSE)


def test_group_auc_averages_over_groups_of_both_classes_by_rows(spark: SparkSession) -> None:
    labels, scores = drawn(4000, 5, 2)
    random = np.random.default_rng(6)
    groups = random.choice(["a", "b", "c", "d"], len(labels)).astype(object)
    groups[:5] = "one class"
    labels[:5] = 0
    groups[5:40] = None  # rows without a group are one group
    table = pd.DataFrame({"label": labels.astype(np.float32), "score": scores, "g": groups})
    scores_df = spark.createDataFrame(table, "label float, score double, g string")
    found = metrics.evaluate(scores_df, "g")
    total = weight = 0.0
    for _, part in table.fillna({"g": "none"}).groupby("g"):
        if part["label"].nunique() == 2:
            total += roc_auc_score(part["label"], part["score"]) * len(part)
            weight += len(part)
    assert found.group_auc == pytest.approx(total / weight, abs=CLOSE)
    assert (found.groups, found.groups_left_out) == (5, 1)


def test_group_auc_is_undefined_when_no_group_has_both_classes(spark: SparkSession) -> None:
    rows = [(1.0, 0.5, "a"), (0.0, 0.4, "b")]
    scores_df = spark.createDataFrame(rows, "label float, score double, g string")
    found = metrics.evaluate(scores_df, "g")
    assert (found.group_auc, found.groups, found.groups_left_out) == (None, 0, 2)
    assert "group_auc" not in found.as_floats()


@pytest.mark.parametrize("labels", [[], [0, 0], [1, 1]])
def test_one_class_is_refused(spark: SparkSession, labels: list[int]) -> None:
    with pytest.raises(LcSparkError, match="one class only"):
        metrics.evaluate(frame(spark, labels, [0.5] * len(labels)))


@pytest.mark.parametrize("bad", [math.nan, None, -0.1, 1.1, math.inf])
def test_a_score_that_is_no_probability_is_refused(spark: SparkSession, bad: float | None) -> None:
    rows = [(0.0, 0.5), (1.0, 0.5), (1.0, bad)]
    with pytest.raises(LcSparkError, match="1 scores are not in"):
        metrics.evaluate(spark.createDataFrame(rows, "label float, score double"))


def test_log_loss_equals_scikit_learn_and_takes_one_class(spark: SparkSession) -> None:
    labels, scores = drawn(2000, 9, 3)
    found = metrics.log_loss(frame(spark, labels, scores))
    assert found == pytest.approx(log_loss(labels, scores), abs=CLOSE)
    assert metrics.log_loss(frame(spark, [1], [0.25])) == pytest.approx(math.log(4), abs=CLOSE)
    with pytest.raises(LcSparkError, match="no scores"):
        metrics.log_loss(frame(spark, [], []))


labels_and_ranks = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 30)), min_size=2, max_size=60
).filter(lambda rows: len({label for label, _ in rows}) == 2)
few = settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@few
@given(rows=labels_and_ranks)
def test_auc_keeps_under_a_monotone_map_and_turns_with_the_labels(
    spark: SparkSession, rows: list[tuple[int, int]]
) -> None:
    labels = np.array([label for label, _ in rows])
    ranks = np.array([rank for _, rank in rows])
    scores = (ranks + 1) / 33
    auc = metrics.exact_auc(frame(spark, labels, scores))
    assert auc == pytest.approx(roc_auc_score(labels, scores), abs=CLOSE)
    assert metrics.exact_auc(frame(spark, labels, scores**3 / 2)) == auc
    assert metrics.exact_auc(frame(spark, 1 - labels, scores)) == pytest.approx(1 - auc, abs=CLOSE)


def buckets_of(scores_df: DataFrame, n: int) -> list[Bucket]:
    """The buckets of one system, whatever others there are."""
    other_df = scores_df.select(F.lit("b").alias("system"), "label", F.lit(0.25).alias("score"))
    both_df = scores_df.select(F.lit("a").alias("system"), "label", "score").unionByName(other_df)
    found = metrics.score_buckets(both_df, n)
    assert list(found) == ["a", "b"]
    assert len(found["b"]) == 1
    return found["a"]


def test_score_buckets_take_every_row_once_in_order(spark: SparkSession) -> None:
    labels, scores = drawn(20_000, 4, 9)
    buckets = buckets_of(frame(spark, labels, scores), 10)
    assert len(buckets) == 10
    assert [b.rows for b in buckets] == pytest.approx([2000] * 10, abs=5)
    assert sum(b.rows for b in buckets) == len(labels)
    assert sum(b.positives for b in buckets) == labels.sum()
    means = [b.mean_score for b in buckets]
    assert means == sorted(means)
    ordered = np.sort(scores).reshape(10, -1).mean(axis=1)
    assert means == pytest.approx(ordered, abs=1e-3)


def test_equal_scores_share_a_bucket(spark: SparkSession) -> None:
    buckets = buckets_of(frame(spark, [0, 1, 1, 0], [0.5, 0.5, 0.5, 0.9]), 10)
    assert buckets == [Bucket(3, 2, 0.5), Bucket(1, 0, 0.9)]


def test_roc_points_rise_from_zero_to_one_along_scikit_learns_curve(spark: SparkSession) -> None:
    labels, scores = drawn(20_000, 8, 9)
    buckets = buckets_of(frame(spark, labels, scores), 200)
    fpr, tpr = metrics.roc_points(buckets)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(fpr) >= 0).all()
    assert (np.diff(tpr) >= 0).all()
    exact_fpr, exact_tpr, _ = roc_curve(labels, scores)
    assert np.interp(fpr, exact_fpr, exact_tpr) == pytest.approx(np.array(tpr), abs=2e-3)
    area = np.trapz(tpr, fpr)
    assert area == pytest.approx(roc_auc_score(labels, scores), abs=1e-3)


def test_roc_points_of_two_buckets_by_hand() -> None:
    fpr, tpr = metrics.roc_points([Bucket(4, 1, 0.2), Bucket(2, 1, 0.7)])
    assert fpr == [0, 1 / 4, 1]
    assert tpr == [0, 1 / 2, 1]
