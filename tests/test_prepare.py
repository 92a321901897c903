"""Raw rows prepared in Spark and without it: the law that training and serving agree."""

import dataclasses
import datetime
import decimal
import math
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from lc_spark.errors import LcSparkError
from lc_spark.features.prepare import column_types, prepared_column, texts_column
from lc_spark.field_kinds import AnyField
from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.hashing import hash_text
from lc_spark.pandas_rows import prepare_pandas

NAN, INF = math.nan, math.inf

TYPES = {
    "text": "string",
    "small": "tinyint",
    "whole": "int",
    "big": "bigint",
    "ratio": "double",
    "half": "float",
    "flag": "boolean",
    "day": "date",
    "texts": "array<string>",
    "numbers": "array<bigint>",
    "ratios": "array<double>",
    "flags": "array<boolean>",
    "days": "array<date>",
    "piped": "string",
    "price": "decimal(9,2)",
    "a name.with dots": "string",
}
SCHEMA = ", ".join(f"`{name}` {type_name}" for name, type_name in TYPES.items())
DAY = datetime.date(2013, 1, 2)
# fmt: off
ROWS: list[tuple[Any, ...]] = [
    ("JFK", 1, 1545, 2**53 + 1, 1545.0, 0.5, True, DAY,
     ["a", "b"], [1, 2], [1.0, 2.0], [True], [DAY], "a|b", decimal.Decimal("1.10"), "x"),
    ("", -1, -7, -(2**63), -0.0, -2.0, False, datetime.date(1970, 1, 1),
     [], [], [], [], [], "", decimal.Decimal("-0.05"), ""),
    (None,) * 16,
    ("東京 ✈", 0, 0, 2**63 - 1, NAN, NAN, None, datetime.date(9999, 12, 31),
     ["東京", None, "", "a|b"], [None, 2**60], [NAN, None, -0.0, 3.0], [False, None],
     [None, DAY], "東京||a", decimal.Decimal("9999999.99"), "."),
    ("a|b", 127, 2**31 - 1, 0, 2.0**53 + 2, 16777216.0, True, datetime.date(1, 1, 1),
     ["a", "a"], [5, 5], [2.0**60], [True, True], [DAY, DAY], "|", None, " "),
    ("a\0b\n'\\", -128, -(2**31), 10**15, 1e15, 3.25, False, DAY,
     [None], [None], [NAN], [None], [None], " a | b ", decimal.Decimal("0.00"), "|"),
    ("1545", 7, 1545, 1545, INF, INF, True, DAY,
     ["x" * 40], [0], [0.0], [False], [DAY], "a.b|(|*", decimal.Decimal("3.00"), "é"),
]
# fmt: on


def info_of(column: str, kind: str, **settings_: Any) -> FieldInfo:
    name = f"{column}_{kind}".replace(" ", "_").replace(".", "_")
    return FieldInfo(name, kind, 2, column=column, column_type=TYPES[column], **settings_)


SETS = ("texts", "numbers", "ratios", "flags", "days")
NUMBERS = ("small", "whole", "big", "ratio", "half", "price")
FIELD_MAP = FieldMap(
    (
        *(info_of(c, "categorical") for c in ("text", "small", "whole", "big", "flag", "day")),
        info_of("a name.with dots", "categorical"),
        *(info_of(c, "multivalued") for c in SETS),
        info_of("piped", "multivalued", delimiter="|"),
        *(info_of(c, "bucketed") for c in NUMBERS),
        *(info_of(c, "continuous") for c in NUMBERS),
        info_of("ratio", "categorical"),
    )
)


def prepare_in_spark(df: DataFrame, field_map: FieldMap) -> dict[str, list[Any]]:
    table = df.select(*[prepared_column(info) for info in field_map.fields]).toArrow()
    return {name: table[name].to_pylist() for name in table.column_names}


def assert_both_agree(df: DataFrame, field_map: FieldMap) -> None:
    in_spark = prepare_in_spark(df, field_map)
    in_pandas = prepare_pandas(df.toPandas(), field_map)
    for info in field_map.fields:
        expected, found = in_spark[info.name], in_pandas[info.name].to_pylist()
        if info.kind == "multivalued":  # a missing list and an empty one are the same to encode
            expected = [values or [] for values in expected]
        assert found == expected, info.name


@pytest.fixture(scope="module")
def raw_df(spark: SparkSession) -> DataFrame:
    return spark.createDataFrame(ROWS, SCHEMA).coalesce(1).cache()


def test_spark_and_pandas_prepare_every_type_alike(raw_df: DataFrame) -> None:
    fields = tuple(info for info in FIELD_MAP.fields if info.name != "ratio_categorical")
    # A big integer beside a missing one becomes a double in pandas, which cannot hold it.
    integers = tuple(i for i in fields if i.column != "big")
    assert_both_agree(raw_df, FieldMap(integers))
    assert_both_agree(raw_df.where("big IS NOT NULL"), FieldMap(fields))


def test_whole_numbers_of_a_double_column_are_prepared_alike(raw_df: DataFrame) -> None:
    whole_df = raw_df.where("ratio IS NULL OR isnan(ratio) OR abs(ratio) < 1e300")
    assert_both_agree(whole_df, FieldMap((FIELD_MAP["ratio_categorical"],)))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
# Words of separators and of what regular expressions read as commands.
PIPED = st.text("ab|.*\\[( é", max_size=8)
LARGEST_DAY = datetime.date(9999, 12, 31)


def row_strategy() -> st.SearchStrategy[tuple[Any, ...]]:
    longs = st.integers(-(2**63), 2**63 - 1)
    whole_doubles = st.integers(-(2**62), 2**62).map(float)
    values: list[st.SearchStrategy[Any]] = [
        st.none() | TEXT,
        st.none() | st.integers(-128, 127),
        st.none() | st.integers(-(2**31), 2**31 - 1),
        longs,
        st.none() | st.just(NAN) | whole_doubles,
        st.none() | st.floats(width=32),
        st.none() | st.booleans(),
        st.none() | st.dates(max_value=LARGEST_DAY),
        st.none() | st.lists(st.none() | TEXT, max_size=4),
        # pandas reads a list that lacks a value as doubles.
        st.none() | st.lists(st.none() | st.integers(-(2**53), 2**53), max_size=4),
        st.none() | st.lists(st.none() | st.just(NAN) | whole_doubles, max_size=4),
        st.none() | st.lists(st.none() | st.booleans(), max_size=4),
        st.none() | st.lists(st.none() | st.dates(max_value=LARGEST_DAY), max_size=4),
        st.none() | PIPED,
        st.none() | st.decimals(-9_999_999, 9_999_999, places=2),
        st.none() | TEXT,
    ]
    return st.tuples(*values)


@settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # to shrink would be a Spark job each time
    suppress_health_check=list(HealthCheck),
)
@given(rows=st.lists(row_strategy(), min_size=60, max_size=60))
def test_spark_and_pandas_prepare_any_row_alike(
    spark: SparkSession, rows: list[tuple[Any, ...]]
) -> None:
    assert_both_agree(spark.createDataFrame(rows, SCHEMA).coalesce(1), FIELD_MAP)


def test_any_delimiter_is_taken_literally(spark: SparkSession) -> None:
    delimiters = ["|", "||", ".", " ", "\\", "[", "^", "$", "\t", "é", "\\d", "a{1}", "#", "-"]
    infos = [
        FieldInfo(f"f{i}", "multivalued", 2, column=f"c{i}", column_type="string", delimiter=d)
        for i, d in enumerate(delimiters)
    ]
    row = tuple(delimiter.join(["x", "1", "", "東京"]) for delimiter in delimiters)
    df = spark.createDataFrame([row], ", ".join(f"{info.column} string" for info in infos))
    expected = [[hash_text(part) for part in ("x", "1", "東京")]]
    field_map = FieldMap(tuple(infos))
    assert prepare_in_spark(df, field_map) == {info.name: expected for info in infos}
    assert_both_agree(df, field_map)


def test_python_hashes_text_as_spark_does(spark: SparkSession) -> None:
    # Lengths on both sides of the hash's blocks of 4, 8 and 32 bytes; one to four bytes a letter.
    words = ["a" * n for n in range(1, 70)] + ["é東😀\0"[: n % 5] + "x" * n for n in range(1, 40)]
    df = spark.createDataFrame([(word,) for word in words], "word string")
    rows = df.select("word", F.xxhash64("word").alias("hash")).collect()
    assert len(rows) == len(words)
    assert [row["hash"] for row in rows] == [hash_text(row["word"]) for row in rows]


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        # in the order of ROWS
        ("text", ["JFK", None, None, "東京 ✈", "a|b", "a\0b\n'\\", "1545"]),
        ("whole", ["1545", "-7", None, "0", "2147483647", "-2147483648", "1545"]),
        ("ratio", ["1545", "0", None, None, str(2**53 + 2), "1000000000000000", "Infinity"]),
        ("flag", ["true", "false", None, None, "true", "false", "true"]),
        ("texts", [["a", "b"], [], None, ["東京", "a|b"], ["a", "a"], [], ["x" * 40]]),
        ("ratios", [["1", "2"], [], None, ["0", "3"], [str(2**60)], [], ["0"]]),
        ("piped", [["a", "b"], [], None, ["東京", "a"], [], [" a ", " b "], ["a.b", "(", "*"]]),
    ],
)
def test_values_as_text(raw_df: DataFrame, column: str, texts: list[Any]) -> None:
    kind = "multivalued" if isinstance(texts[0], list) else "categorical"
    info = FIELD_MAP[f"{column}_{kind}"]
    rows = raw_df.select(texts_column(info).alias("texts")).collect()
    assert [row["texts"] for row in rows] == texts


def field(**settings_: Any) -> AnyField:
    made: AnyField = TypeAdapter(AnyField).validate_python(settings_)
    return made


def test_column_types_reads_the_columns_of_the_fields_alone(raw_df: DataFrame) -> None:
    fields = [
        field(name="word", column="text", kind="categorical"),
        field(name="price", kind="continuous"),
        field(name="texts", kind="multivalued"),
        field(kind="crossed", of=["word", "price"]),
    ]
    assert column_types(raw_df, fields) == {
        "text": "string",
        "price": "decimal(9,2)",
        "texts": "array<string>",
    }


def test_a_missing_column_is_an_error_with_the_nearest_name(raw_df: DataFrame) -> None:
    with pytest.raises(LcSparkError) as error:
        column_types(raw_df, [field(name="cost", column="pricee", kind="continuous")])
    assert "'cost' reads column 'pricee', which the table lacks" in str(error.value)
    assert "Did you mean 'price'?" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "column", "message"),
    [
        ("bucketed", "text", "'f' is bucketed, but its column is string: it must be a number"),
        ("continuous", "day", "'f' is continuous, but its column is date: it must be a number"),
        ("continuous", "numbers", "'f' is continuous, but its column is array<bigint>"),
        ("categorical", "price", r"'f' is categorical, but its values are decimal\(9,2\)"),
        ("categorical", "texts", "'f' is categorical, but its values are array<string>"),
        ("multivalued", "whole", "'f' is multivalued, but its column is int: .* array"),
        ("multivalued", "text", "'f' is multivalued, but its column is string: .*'delimiter'"),
    ],
)
def test_a_column_of_a_wrong_type_is_an_error(
    raw_df: DataFrame, kind: str, column: str, message: str
) -> None:
    with pytest.raises(LcSparkError, match=message):
        column_types(raw_df, [field(name="f", column=column, kind=kind)])


def test_hashed_and_named_fields_prepare_alike(raw_df: DataFrame) -> None:
    info = dataclasses.replace(FIELD_MAP["text_categorical"], name="word", hashed=10, size=11)
    prepared = prepare_pandas(raw_df.toPandas(), FieldMap((info,)))
    assert list(prepared) == ["word"]
    assert prepare_in_spark(raw_df, FieldMap((info,))) == {"word": prepared["word"].to_pylist()}


def test_pandas_made_of_json_is_prepared_as_the_table_was(spark: SparkSession) -> None:
    rows = [("1", 1, DAY, ["a"]), ("2", None, None, None)]
    df = spark.createDataFrame(rows, "text string, whole int, day date, texts array<string>")
    info = [info_of("text", "categorical"), info_of("whole", "categorical")]
    field_map = FieldMap((*info, info_of("day", "categorical"), info_of("texts", "multivalued")))
    from_json = pd.DataFrame(
        {"text": [1, 2], "whole": [1.0, None], "day": ["2013-01-02", None], "texts": [["a"], None]}
    )
    in_pandas = prepare_pandas(from_json, field_map)
    in_spark = prepare_in_spark(df, field_map)
    in_spark["texts_multivalued"][1] = []
    assert {name: column.to_pylist() for name, column in in_pandas.items()} == in_spark
