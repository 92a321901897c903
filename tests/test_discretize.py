"""Numbers to cut points and standardised values: what is fitted, and the index it gives."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession

from lc_spark.encoder import Vocabulary, encode
from lc_spark.errors import LcSparkError
from lc_spark.features.discretize import fit_numeric, refuse_fractions, summary
from lc_spark.field_kinds import Bucketed, Categorical, Continuous
from lc_spark.field_map import FieldInfo, FieldMap

NAN, INF = math.nan, math.inf

SCHEMA = """row_id long, ascending int, equal_quantiles int, constant double, with_infinity double,
    hits bigint, small float, price decimal(9,2), nothing double, only_nan double, one_value double,
    `a name.with dots` double"""
ROWS = [
    (1, 1, 0, 3.5, 0.0, 0, 0.5, None, None, NAN, None, 1.0),
    (2, 2, 1, 3.5, 10.0, 1, 1.5, None, None, NAN, None, 2.0),
    (3, 3, 1, None, INF, 2, None, None, None, NAN, 7.0, 3.0),
    (4, 4, 1, 3.5, -INF, 3, None, None, None, NAN, None, 4.0),
    (5, 5, 1, 3.5, NAN, 100, None, None, None, NAN, None, 5.0),
    (6, 6, 1, NAN, None, None, None, None, None, NAN, None, 6.0),
    (7, 7, 1, 3.5, 4.0, -5, None, None, None, NAN, None, 7.0),
    (8, 8, 2, 3.5, 6.0, 2, None, None, None, NAN, None, 8.0),
]
LOG_SQUARED_CUTS = [
    0.0,
    1.0,
    2.0,
    *(math.exp(math.sqrt(n)) for n in range(1, 22)),  # e^sqrt(21) = 97.8, e^sqrt(22) = 108.9
]

FIELDS = (
    Bucketed(name="quartile", kind="bucketed", column="ascending", buckets=4),
    Bucketed(name="half", kind="bucketed", column="ascending", buckets=2),
    Bucketed(name="whole", kind="bucketed", column="ascending", buckets=1),
    Bucketed(name="equal_quantiles", kind="bucketed", buckets=4),
    Bucketed(name="constant", kind="bucketed", buckets=4),
    Bucketed(name="constant_width", kind="bucketed", column="constant", by="uniform"),
    Bucketed(name="width", kind="bucketed", column="with_infinity", by="uniform", buckets=5),
    Bucketed(name="middle", kind="bucketed", column="with_infinity", buckets=2),
    Bucketed(name="hits", kind="bucketed", by="log_squared"),
    Bucketed(name="small", kind="bucketed", by="log_squared"),
    Bucketed(name="edges", kind="bucketed", column="hits", by="cut_points", cut_points=(0, 2.5)),
    Bucketed(name="no_price", kind="bucketed", column="price", buckets=4),
    Bucketed(name="nothing", kind="bucketed", buckets=4),
    Bucketed(name="only_nan", kind="bucketed", by="log_squared"),
    Bucketed(name="dotted", kind="bucketed", column="a name.with dots", buckets=2),
    Continuous(name="rank", kind="continuous", column="ascending"),
    Continuous(name="level", kind="continuous", column="with_infinity"),
    Continuous(name="flat", kind="continuous", column="constant"),
    Continuous(name="single", kind="continuous", column="one_value"),
    Continuous(name="empty", kind="continuous", column="nothing"),
)


def types_of(df: DataFrame) -> dict[str, str]:
    return {column.name: column.dataType.simpleString() for column in df.schema.fields}


def fit(
    df: DataFrame, fields: Sequence[Bucketed | Continuous], rows: int | None = None
) -> FieldMap:
    types = types_of(df)
    found = summary(df, fields, types)
    found["rows"] = rows or found["rows"]
    return FieldMap(tuple(fit_numeric(df, found, fields, types, seed=0)))


def encode_numbers(info: FieldInfo, values: Sequence[float | None]) -> list[float]:
    field_map = FieldMap((info,))
    columns = {info.name: pa.array(values, pa.float64())}
    encoded: list[float] = encode(columns, field_map, Vocabulary({}))[info.name].tolist()
    return encoded


@pytest.fixture(scope="module")
def fitted(spark: SparkSession) -> FieldMap:
    return fit(spark.createDataFrame(ROWS, SCHEMA), FIELDS)


@pytest.mark.parametrize(
    ("name", "cut_points"),
    [
        ("quartile", [2.75, 4.5, 6.25]),  # linear between order statistics, as numpy does
        ("half", [4.5]),
        ("whole", []),
        ("equal_quantiles", [1.0]),  # three equal quantiles are one edge
        ("constant", []),
        ("constant_width", []),
        ("width", [2.0, 4.0, 6.0, 8.0]),  # infinities do not stretch the range
        ("middle", [5.0]),
        ("hits", LOG_SQUARED_CUTS),
        ("small", [1.0]),  # range 0.5 to 1.5: no edge above it, none at its start
        ("edges", [0.0, 2.5]),
        ("no_price", []),
        ("nothing", []),
        ("only_nan", []),
        ("dotted", [4.5]),
    ],
)
def test_cut_points(fitted: FieldMap, name: str, cut_points: list[float]) -> None:
    info = fitted[name]
    assert info.cut_points == pytest.approx(cut_points, rel=1e-12)
    assert info.size == len(cut_points) + 2


@pytest.mark.parametrize(
    ("name", "values", "indices"),
    [
        ("quartile", [1, 2.75, 4.4, 4.5, 6.25, 8], [1, 2, 2, 3, 4, 4]),
        ("quartile", [-100, 0.99, 8.01, 1e9], [1, 1, 4, 4]),  # outside the fitted range
        ("quartile", [None, NAN, INF, -INF], [0, 0, 4, 1]),
        ("whole", [1, 8, -INF, INF, None], [1, 1, 1, 1, 0]),
        ("equal_quantiles", [0, 0.5, 1, 2, None], [1, 1, 2, 2, 0]),
        ("constant", [3.5, 3.4, 3.6, INF, None, NAN], [1, 1, 1, 1, 0, 0]),
        ("width", [-1, 0, 1.9, 2, 8, 10, 11], [1, 1, 1, 2, 5, 5, 5]),
        ("width", [INF, -INF, NAN, None], [5, 1, 0, 0]),
        # -5, 0, 1, 2 are edges' own buckets; log(3)^2 = 1.2, log(100)^2 = 21.2.
        ("hits", [-5, -0.5, 0, 1, 2, 3, 100], [1, 1, 2, 3, 4, 5, 25]),
        ("edges", [-1, 0, 2, 2.5, 3, None], [1, 2, 2, 3, 3, 0]),
        ("nothing", [1, None], [1, 0]),
    ],
)
def test_a_value_falls_into_its_bucket(
    fitted: FieldMap, name: str, values: list[float | None], indices: list[int]
) -> None:
    assert encode_numbers(fitted[name], values) == indices


def test_log_squared_buckets_are_criteos_above_two(fitted: FieldMap) -> None:
    values = [3, 5, 10, 20, 40, 80, 97]
    first = 4  # below 0, [0, 1), [1, 2), then floor(log(x)^2) = 0 from 2 on
    expected = [first + math.floor(math.log(x) ** 2) for x in values]
    assert encode_numbers(fitted["hits"], values) == expected


@pytest.mark.parametrize(
    ("name", "mean", "sd", "low", "high"),
    [
        ("rank", 4.5, math.sqrt(5.25), 1, 8),
        ("level", 5.0, math.sqrt(13.0), 0, 10),  # of the finite values 0, 10, 4, 6
        ("flat", 3.5, 1, 3.5, 3.5),
        ("single", 7, 1, 7, 7),
        ("empty", 0, 1, 0, 0),
    ],
)
def test_mean_sd_and_range(
    fitted: FieldMap, name: str, mean: float, sd: float, low: float, high: float
) -> None:
    info = fitted[name]
    assert (info.mean, info.sd) == pytest.approx((mean, sd), rel=1e-8)
    assert (info.low, info.high) == (low, high)
    assert info.size == 2


@pytest.mark.parametrize(
    ("name", "values", "standardised"),
    [
        ("level", [5.0, 10.0, 0.0], [0.0, 5 / math.sqrt(13), -5 / math.sqrt(13)]),
        ("level", [11.0, INF, -INF], [5 / math.sqrt(13), 5 / math.sqrt(13), -5 / math.sqrt(13)]),
        ("level", [None, NAN], [NAN, NAN]),
        ("flat", [3.5, 99.0, INF, None], [0.0, 0.0, 0.0, NAN]),
        ("empty", [12.0, INF, None], [0.0, 0.0, NAN]),
    ],
)
def test_a_continuous_value_is_standardised(
    fitted: FieldMap, name: str, values: list[float | None], standardised: list[float]
) -> None:
    np.testing.assert_allclose(encode_numbers(fitted[name], values), standardised, rtol=1e-6)


def test_the_raw_column_and_its_type_are_kept(fitted: FieldMap) -> None:
    assert (fitted["rank"].column, fitted["rank"].column_type) == ("ascending", "int")
    assert (fitted["no_price"].column, fitted["no_price"].column_type) == ("price", "decimal(9,2)")


def test_no_numeric_field_needs_no_pass(spark: SparkSession) -> None:
    assert fit(spark.range(1), []).fields == ()


def test_the_fit_does_not_depend_on_the_partitioning(spark: SparkSession) -> None:
    numbers = random.Random(5)
    rows = []
    for i in range(1000):
        x = numbers.gauss(0, 1)
        # The true mean is 0, so the sum is rounding errors alone, in an order that Spark chooses.
        rows += [(2 * i, x, 1e6 + x), (2 * i + 1, -x, 1e6 - x)]
    df = spark.createDataFrame(rows, "row_id long, x double, far double")
    fields = (
        Continuous(name="x", kind="continuous"),
        Continuous(name="far", kind="continuous"),
        Bucketed(name="x_buckets", kind="bucketed", column="x", buckets=7),
        Bucketed(name="x_widths", kind="bucketed", column="x", by="uniform", buckets=7),
    )
    # More rows than SAMPLE_ROWS, so it is told: quantiles are then of a sample, here of half.
    fits = [fit(df.repartition(n), fields, rows=2_000_000) for n in (1, 3)]
    assert fits[0] == fits[1]
    assert fits[0].fingerprint == fits[1].fingerprint
    exact = np.quantile([row[1] for row in rows], np.arange(1, 7) / 7)
    np.testing.assert_allclose(fits[0]["x_buckets"].cut_points, exact, atol=0.15)
    assert fits[0]["x_buckets"].cut_points != pytest.approx(exact)


FLOATS_SCHEMA = "whole double, fraction double, half float, text string"
FLOATS_ROWS = [(1.0, 1.0, 1.0, "0.5"), (INF, 2.25, NAN, "x"), (NAN, INF, 2.5, None), (None,) * 4]


def test_whole_numbers_in_a_double_column_may_be_categorical(spark: SparkSession) -> None:
    df = spark.createDataFrame(FLOATS_ROWS, FLOATS_SCHEMA)
    fields = [
        Categorical(name="whole", kind="categorical"),
        Categorical(name="t", column="text", kind="categorical"),
    ]
    refuse_fractions(summary(df, fields, types_of(df)), fields)


@pytest.mark.parametrize(("column", "example"), [("fraction", "2.25"), ("half", "2.5")])
def test_fractions_in_a_categorical_column_are_refused_with_an_example(
    spark: SparkSession, column: str, example: str
) -> None:
    df = spark.createDataFrame(FLOATS_ROWS, FLOATS_SCHEMA)
    field = Categorical(name="f", kind="categorical", column=column)
    with pytest.raises(LcSparkError, match=f"'f' is categorical.*'{column}' holds.*{example}"):
        refuse_fractions(summary(df, [field], types_of(df)), [field])
