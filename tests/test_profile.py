"""A table is profiled as it is: what its columns hold, its label, its days, what leaks."""

import datetime
import random
from pathlib import Path

import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from lc_spark.errors import LcSparkError
from lc_spark.init import leaks
from lc_spark.init.columns import ColumnProfile
from lc_spark.init.profile import Label, Profile, profile
from lc_spark.source_settings import Files
from lc_spark.sources import read_files

ROWS = 600
TAGS = ("red|blue", "blue", "green|red|blue", "green", "red", "blue|green")
SCHEMA = (
    "outcome string, request string, day string, `user.age` string, `site name` string, "
    "tags string, town string, amount string, visits string, zip string, user string, "
    "refund string, hint string, same string, empty string, score double, basket array<string>, "
    "place struct<x: int>, noted string"
)


@pytest.fixture(scope="module")
def mixed(spark: SparkSession) -> Profile:
    """600 rows as CSV gives them, and columns of other types; every 20th has no label."""
    chance = random.Random(3)
    first = datetime.date(2024, 1, 1)
    rows = []
    for i in range(ROWS):
        positive = chance.random() < 0.3
        outcome = None if i % 20 == 0 else "yes" if positive else "no"
        rows.append(
            (
                outcome,
                f"r{i:03d}",
                str(first + datetime.timedelta(days=i // 10)),
                str(18 + i % 60),
                f"site {i % 7}",
                TAGS[i % 6],
                f"Town{i % 5}, Land{i % 2}",
                str((i * 37 % 500) / 4),
                str(i % 3 if i % 9 else i * i),
                f"{i % 70:05d}",
                f"u{i % 400}",
                str(i % 11 + 0.5) if positive else "",
                "a" if positive != (i % 25 == 1) else "b",
                "k",
                "",
                float("nan") if i % 6 == 0 else i / 7 - 40,
                ["x", "y"] if i % 2 else ["z"],
                (i,),
                "NA" if i % 30 == 0 else str(i % 90),
            )
        )
    return profile(spark.createDataFrame(rows, SCHEMA), "outcome")


def column(found: Profile, name: str) -> ColumnProfile:
    return next(c for c in found.columns if c.name == name)


def test_yes_and_no_become_an_expression_in_which_missing_stays_missing(mixed: Profile) -> None:
    label = mixed.label
    assert label.expression == "nullif(outcome, '') = 'yes'"
    assert (label.positive, label.negative, label.missing) == ("yes", "no", 30)
    assert label.positives + label.negatives == 570
    assert mixed.rows == ROWS


@pytest.mark.parametrize(
    ("name", "holds", "distinct", "missing"),
    [
        ("request", "text", 600, 0),
        ("day", "date", 60, 0),
        ("user.age", "number", 60, 0),
        ("site name", "text", 7, 0),
        ("refund", "number", 11, None),
        ("same", "text", 1, 0),
        ("empty", "text", 0, 600),
        ("score", "number", 500, 100),
        ("basket", "array", 2, 0),
        ("place", "other", 0, 0),
        ("noted", "text", 91, 0),
    ],
)
def test_a_column_is_counted(
    mixed: Profile, name: str, holds: str, distinct: int, missing: int | None
) -> None:
    found = column(mixed, name)
    assert found.holds == holds
    assert found.distinct == pytest.approx(distinct, rel=0.04)
    assert missing is None or found.missing == missing


def test_what_the_sample_shows(mixed: Profile) -> None:
    assert [c.name for c in mixed.columns if c.unique] == ["request"]
    assert [c.name for c in mixed.columns if c.delimiter] == ["tags"]
    tags = column(mixed, "tags")
    assert (tags.delimiter, tags.values, tags.most_values) == ("|", 3, 3)
    assert [c.name for c in mixed.columns if c.leading_zeros] == ["zip"]
    assert column(mixed, "noted").odd_text == 20
    assert (column(mixed, "amount").low, column(mixed, "amount").high) == (0.0, 124.75)
    assert column(mixed, "amount").fractions
    assert not column(mixed, "visits").fractions


def test_days_hold_their_labelled_rows(mixed: Profile) -> None:
    assert mixed.date == "day"
    assert len(mixed.days) == 60
    assert mixed.days[0].day == datetime.date(2024, 1, 1)
    assert sum(day.rows for day in mixed.days) == 570
    assert sum(day.positives for day in mixed.days) == mixed.label.positives


def test_only_what_tells_the_label_of_other_rows_leaks(mixed: Profile) -> None:
    auc = {c.name: c.alone.auc for c in mixed.columns if c.alone}
    assert auc["refund"] > 0.999
    assert 0.9 < auc["hint"] < 0.98
    # 400 values in 570 rows: a rate over the same rows would be nearly perfect.
    assert 0.4 < auc["user"] < 0.6
    assert 0.4 < auc["amount"] < 0.6


def test_alone_ranks_numbers_both_ways_and_gives_unique_keys_nothing(spark: SparkSession) -> None:
    rows = [(float(i >= 6), i % leaks.FOLDS, i, float(-i)) for i in range(10)]
    sample_df = spark.createDataFrame(
        rows, f"{leaks.LABEL} double, {leaks.FOLD} int, k long, v double"
    )
    keys = {"id": F.col("k"), "falling": F.lit(None).cast("long")}
    found = leaks.alone(sample_df, keys, {"falling": F.col("v")})
    assert found["id"].auc == 0.5
    assert found["id"].loss_share == pytest.approx(1.0)
    assert found["falling"].auc == 1.0


@pytest.mark.parametrize(
    ("type_name", "values", "expected"),
    [
        ("int", [0, 1, 0, None], Label("y", "y", "1", "0", 1, 2, 1)),
        ("boolean", [True, False, False], Label("y", "y", "true", "false", 1, 2, 0)),
        ("string", ["0", "1", "1", ""], Label("y", "y", "1", "0", 2, 1, 1)),
        ("int", [1, 2, 2], Label("y", "cast(y AS STRING) = '1'", "1", "2", 1, 2, 0)),
        (
            "double",
            [2.0, 1.0, 1.0, float("nan")],
            Label("y", "nullif(y, double('NaN')) = 2", "2", "1", 1, 2, 1),
        ),
        ("string", ["it's", "b"], Label("y", "nullif(y, '') = 'it\\'s'", "it's", "b", 1, 1, 0)),
    ],
)
def test_a_label_of_two_values(
    spark: SparkSession, type_name: str, values: list[object], expected: Label
) -> None:
    source_df = spark.createDataFrame([(v,) for v in values], f"y {type_name}")
    found = profile(source_df, "y")
    assert found.label == expected
    row = source_df.agg(F.expr(f"count_if({expected.expression} = true)")).first()
    assert row is not None
    assert row[0] == expected.positives


def test_a_line_that_does_not_parse_is_counted_and_not_looked_at(
    spark: SparkSession, tmp_path: Path
) -> None:
    lines = ["y,site,n", "0,a,1", "1,b,2", "1,c,3,4", "0,a,5", ",b,6"]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    found = profile(
        read_files(spark, Files(format="csv"), [str(tmp_path / "log.csv")], "TABLE"), "y"
    )
    assert (found.rows, found.corrupt, found.label.missing) == (5, 1, 1)
    assert [(c.name, c.holds, c.distinct) for c in found.columns] == [
        ("site", "text", 2),
        ("n", "number", 4),
    ]
    assert found.label.positives == 1


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        ("clickd", "no column 'clickd' for the label. Did you mean 'clicked'?"),
        ("clicked", r"column 'clicked' has 3 value\(s\) \('a', 'b', 'c'\)"),
        ("one", r"column 'one' has 1 value\(s\) \('1'\)"),
        ("many", "column 'many' has more than 9 values"),
    ],
)
def test_a_label_that_cannot_be_one_is_told(spark: SparkSession, label: str, sentence: str) -> None:
    rows = [("abc"[i % 3], 1, i) for i in range(30)]
    source_df = spark.createDataFrame(rows, "clicked string, one int, many int")
    with pytest.raises(LcSparkError, match=sentence):
        profile(source_df, label)
