"""Train rows to vocabularies, levels and a field map: which value gets which index, and why."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import levels_of
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from lc_spark.encoder import encode
from lc_spark.errors import LcSparkError
from lc_spark.features import counts, memory
from lc_spark.features import levels as level_names
from lc_spark.features.counts import BUCKETS, bundled
from lc_spark.features.fit import Fitted, fit_features
from lc_spark.features.ranking import rank, to_vocabulary
from lc_spark.features.vocabulary import count_values
from lc_spark.field_kinds import AnyField
from lc_spark.field_map import FieldInfo
from lc_spark.hashing import hash_text
from lc_spark.pandas_rows import prepare_pandas

NAN, INF = float("nan"), float("inf")
SCHEMA = """row_id long, origin string, dest string, hour int, delay double, tags string,
    sets array<string>, whole double, same string, gone string, no_sets array<string>"""
ROWS: list[tuple[Any, ...]] = [
    (1, "JFK", "LAX", 6, 0.0, "a|b", ["x"], 1.0, "s", None, None),
    (2, "JFK", "LAX", 6, 1.0, "a", ["x", "y"], 1.0, "s", "", None),
    (3, "JFK", "LAX", 6, 2.0, "b|a", [], 2.0, "s", None, []),
    (4, "LGA", "LAX", 9, 3.0, "c", None, 2.0, "s", None, [None]),
    (5, "LGA", "東京", 9, 4.0, "", ["x|y"], 10.0, "s", None, None),
    (6, "EWR", "東京", 9, 10.0, None, ["x|y"], 10.0, "s", "", [""]),
    (7, "EWR", "東京", None, None, "|", ["y", None], NAN, "s", None, None),
    (8, "", "a × b", None, NAN, "d", ["z"], None, "s", None, None),
    (9, None, "BOS", None, INF, "a|d", ["x"], INF, "s", None, None),
    (10, None, None, 23, None, "b", ["y"], 3.0, "s", None, None),
]
TAGS: dict[str, Any] = {"kind": "multivalued", "column": "tags", "delimiter": "|"}
SETTINGS: list[dict[str, Any]] = [
    {"name": "origin_x_dest", "kind": "crossed", "of": ["origin", "dest"], "min_count": 2},
    {"name": "origin", "kind": "categorical", "min_count": 2},
    {"name": "dest", "kind": "categorical", "min_count": 2},
    {"name": "hour", "kind": "categorical", "min_count": 1},
    {"name": "delay", "kind": "bucketed", "by": "uniform", "buckets": 2},
    {"name": "late", "kind": "continuous", "column": "delay"},
    {"name": "tags", "min_count": 2, "max_values": 2, **TAGS},
    {"name": "sets", "kind": "multivalued", "min_count": 2, "max_values": 2},
    {"name": "whole", "kind": "categorical", "min_count": 1},
    {"name": "same", "kind": "categorical"},
    {"name": "gone", "kind": "categorical"},
    {"name": "no_sets", "kind": "multivalued"},
    {"name": "dest_hashed", "column": "dest", "kind": "categorical", "hashed": 3},
    {"name": "tags_hashed", "hashed": 2, **TAGS},
    {"kind": "crossed", "of": ["hour", "delay"], "min_count": 1},
    {"name": "hashed_cross", "kind": "crossed", "of": ["hour", "dest_hashed"], "hashed": 4},
]


def fields_of(settings: list[dict[str, Any]]) -> list[AnyField]:
    made: list[AnyField] = TypeAdapter(list[AnyField]).validate_python(settings)
    return made


def slot(text: str, hashed: int) -> int:
    value = hash_text(text)
    assert value is not None
    return value % 2**64 % hashed + 1


@pytest.fixture(scope="module")
def train_df(spark: SparkSession) -> DataFrame:
    return spark.createDataFrame(ROWS, SCHEMA).coalesce(1)


@pytest.fixture(scope="module")
def fitted(train_df: DataFrame) -> Fitted:
    return fit_features(train_df, fields_of(SETTINGS), seed=0)


@pytest.fixture(scope="module")
def levels(fitted: Fitted) -> Mapping[str, list[tuple[int, str, int]]]:
    """(index, value, count) by field, in the order of the indices."""
    by_field: dict[str, list[tuple[int, str, int]]] = {}
    for row in levels_of(fitted):
        by_field.setdefault(row["field"], []).append((row["index"], row["value"], row["count"]))
    return by_field


@pytest.fixture(scope="module")
def encoded(train_df: DataFrame, fitted: Fitted) -> Mapping[str, NDArray[Any]]:
    columns = prepare_pandas(train_df.toPandas(), fitted.field_map)
    return encode(columns, fitted.field_map, fitted.vocabulary)


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        # Count descending, value ascending by code point; 0 missing and 1 rare come first.
        ("origin", [(0, "(missing)", 3), (1, "(other)", 0), (2, "JFK", 3), (3, "EWR", 2),
                    (4, "LGA", 2)]),
        ("dest", [(0, "(missing)", 1), (1, "(other)", 2), (2, "LAX", 4), (3, "東京", 3)]),
        ("hour", [(0, "(missing)", 3), (1, "(other)", 0), (2, "6", 3), (3, "9", 3),
                  (4, "23", 1)]),
        # Doubles that are whole read as integers; as text "10" is before "2".
        ("whole", [(0, "(missing)", 2), (1, "(other)", 0), (2, "1", 2), (3, "10", 2),
                   (4, "2", 2), (5, "3", 1), (6, "Infinity", 1)]),
        ("same", [(0, "(missing)", 0), (1, "(other)", 0), (2, "s", 10)]),
        ("gone", [(0, "(missing)", 10), (1, "(other)", 0)]),
        # Values are counted, not rows: c is rare; "", null and "|" are missing.
        ("tags", [(0, "(missing)", 3), (1, "(other)", 1), (2, "a", 4), (3, "b", 3), (4, "d", 2)]),
        # An array is never split, so "x|y" is a value; [] and null are missing.
        ("sets", [(0, "(missing)", 2), (1, "(other)", 1), (2, "x", 3), (3, "y", 3),
                  (4, "x|y", 2)]),
        ("no_sets", [(0, "(missing)", 10), (1, "(other)", 0)]),
        # Finite range 0 to 10 in two; infinity is in the upper bucket, NaN is missing.
        ("delay", [(0, "(missing)", 3), (1, "[-inf, 5)", 5), (2, "[5, inf)", 2)]),
        ("late", [(0, "(missing)", 3), (1, "(value)", 7)]),
    ],
)  # fmt: skip
def test_levels(
    levels: Mapping[str, list[tuple[int, str, int]]],
    field: str,
    expected: list[tuple[int, str, int]],
) -> None:
    assert levels[field] == expected


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        # Equal counts in the order of the parents' indices; LGA × LAX and LGA × 東京 are rare.
        ("origin_x_dest", [(0, "(missing)", 1), (1, "(other)", 2), (2, "JFK × LAX", 3),
                           (3, "(missing) × (other)", 2), (4, "EWR × 東京", 2)]),
        ("hour_x_delay", [(0, "(missing)", 2), (1, "(other)", 0), (2, "6 × [-inf, 5)", 3),
                          (3, "9 × [-inf, 5)", 2), (4, "(missing) × [5, inf)", 1),
                          (5, "9 × [5, inf)", 1), (6, "23 × (missing)", 1)]),
    ],
)  # fmt: skip
def test_levels_of_crosses_are_named_by_their_parents(
    levels: Mapping[str, list[tuple[int, str, int]]],
    field: str,
    expected: list[tuple[int, str, int]],
) -> None:
    assert levels[field] == expected


def test_levels_of_hashed_fields_are_numbered_and_counted(
    levels: Mapping[str, list[tuple[int, str, int]]],
) -> None:
    dest, tags = [0] * 4, [0] * 3
    for row in ROWS:
        dest[slot(row[2], 3) if row[2] else 0] += 1
        for index in {slot(tag, 2) for tag in (row[5] or "").split("|") if tag} or {0}:
            tags[index] += 1
    named = [(0, "(missing)"), *((i, f"#{i}") for i in range(1, 4))]
    assert levels["dest_hashed"] == [(*level, n) for level, n in zip(named, dest, strict=True)]
    assert levels["tags_hashed"] == [(*level, n) for level, n in zip(named[:3], tags, strict=True)]


def test_levels_of_a_hashed_cross_are_counted(
    levels: Mapping[str, list[tuple[int, str, int]]],
) -> None:
    assert [level[:2] for level in levels["hashed_cross"]] == [
        (0, "(missing)"),
        (1, "#1"),
        (2, "#2"),
        (3, "#3"),
        (4, "#4"),
    ]
    assert sum(level[2] for level in levels["hashed_cross"]) == len(ROWS)
    assert levels["hashed_cross"][0][2] == 0  # no row lacks both the hour and the destination


def test_levels_are_one_row_a_feature(
    fitted: Fitted, levels: Mapping[str, list[tuple[int, str, int]]]
) -> None:
    assert {name: [level[0] for level in found] for name, found in levels.items()} == {
        info.name: list(range(info.size)) for info in fitted.field_map.fields
    }
    assert sum(len(found) for found in levels.values()) == fitted.field_map.d
    batch = next(fitted.levels.batches())
    assert batch.schema.names == ["field", "index", "value", "hash", "count"]


def test_levels_are_the_same_in_smaller_batches(
    fitted: Fitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pa.Table.from_batches(fitted.levels.batches())
    assert expected.schema == level_names.SCHEMA
    monkeypatch.setattr(level_names, "ROWS_AT_ONCE", 2)
    batches = list(fitted.levels.batches())
    assert max(batch.num_rows for batch in batches) == 2
    assert pa.Table.from_batches(batches).combine_chunks().equals(expected.combine_chunks())


def test_crosses_come_after_their_parents(fitted: Fitted) -> None:
    names = [info.name for info in fitted.field_map.fields]
    written = [field.name for field in fields_of(SETTINGS)]
    crosses = ["origin_x_dest", "hour_x_delay", "hashed_cross"]
    assert names == [name for name in written if name not in crosses] + crosses


@pytest.mark.parametrize(
    ("field", "indices"),
    [
        ("origin", [2, 2, 2, 4, 4, 3, 3, 0, 0, 0]),
        ("dest", [2, 2, 2, 2, 3, 3, 3, 1, 1, 0]),
        ("hour", [2, 2, 2, 3, 3, 3, 0, 0, 0, 4]),
        ("delay", [1, 1, 1, 1, 1, 2, 0, 0, 2, 0]),
        ("tags", [[2, 3], [2, -1], [2, 3], [1, -1], [0, -1], [0, -1], [0, -1], [4, -1], [2, 4],
                  [3, -1]]),
        ("sets", [[2, -1], [2, 3], [0, -1], [0, -1], [4, -1], [4, -1], [3, -1], [1, -1], [2, -1],
                  [3, -1]]),
        ("whole", [2, 2, 4, 4, 3, 3, 0, 0, 6, 5]),
        ("gone", [0] * 10),
        ("no_sets", [[0] + [-1] * 15] * 10),
        ("origin_x_dest", [2, 2, 2, 1, 1, 4, 4, 3, 3, 0]),
        ("hour_x_delay", [2, 2, 2, 3, 3, 5, 0, 0, 4, 6]),
    ],
)  # fmt: skip
def test_train_rows_encode_to_the_indices_of_their_levels(
    encoded: Mapping[str, NDArray[Any]], field: str, indices: list[Any]
) -> None:
    assert encoded[field].tolist() == indices


def test_neither_partitions_nor_buckets_change_anything(
    train_df: DataFrame,
    fitted: Fitted,
    levels: Mapping[str, list[tuple[int, str, int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(counts, "BUCKET_CELLS", 1)
    shuffled = fit_features(train_df.repartition(4, "tags"), fields_of(SETTINGS), seed=0)
    assert shuffled.field_map.fingerprint == fitted.field_map.fingerprint
    assert shuffled.vocabulary.to_arrow().equals(fitted.vocabulary.to_arrow())
    rows = levels_of(shuffled)
    found = [(row["field"], row["index"], row["value"], row["count"]) for row in rows]
    assert found == [(name, *level) for name in sorted(levels) for level in levels[name]]


def test_numbers_alone_need_no_vocabulary(train_df: DataFrame) -> None:
    settings = [{"name": "late", "kind": "continuous", "column": "delay"}]
    fitted = fit_features(train_df, fields_of(settings), seed=0)
    assert fitted.vocabulary.entries == {}
    rows = [(row["index"], row["value"], row["hash"], row["count"]) for row in levels_of(fitted)]
    assert rows == [(0, "(missing)", None, 3), (1, "(value)", None, 7)]


def test_an_empty_train_split_is_an_error(train_df: DataFrame) -> None:
    with pytest.raises(LcSparkError, match="The train split has no rows"):
        fit_features(train_df.where("row_id < 0"), fields_of(SETTINGS[1:2]), seed=0)


def test_fractions_are_refused_before_anything_is_counted(train_df: DataFrame) -> None:
    df = train_df.withColumn("whole", train_df["row_id"] / 4)
    with pytest.raises(LcSparkError, match=r"'whole' is categorical.*fractions such as"):
        fit_features(df, fields_of(SETTINGS[8:9]), seed=0)


def test_crosses_and_their_parents_are_fitted_alone_as_beside_numbers(
    train_df: DataFrame, levels: Mapping[str, list[tuple[int, str, int]]]
) -> None:
    alone = levels_of(fit_features(train_df, fields_of(SETTINGS[:3]), seed=0))
    for name in ("origin", "dest", "origin_x_dest"):
        found = [(r["index"], r["value"], r["count"]) for r in alone if r["field"] == name]
        assert found == levels[name]


def test_two_values_of_one_hash_are_an_error_that_names_both(spark: SparkSession) -> None:
    # xxhash64 is no cryptographic hash: the second half of a 16-byte text can be solved for.
    pair = ("campaign-2013-01", "adgr9960ϓEoφJ%")
    assert hash_text(pair[0]) == hash_text(pair[1])
    info = FieldInfo("campaign", "categorical", 1, column="campaign", column_type="string")
    rows = [(pair[0],), (pair[1],), ("other",), (None,)]
    df = spark.createDataFrame(rows, "campaign string")
    with pytest.raises(LcSparkError, match="same 64-bit hash") as error:
        rank(count_values(df, [info], BUCKETS), {"campaign": 1})
    assert "Field 'campaign'" in str(error.value)
    assert all(repr(value) in str(error.value) for value in pair)


def test_a_large_log_is_counted_in_many_tasks_however_few_cores_there_are(
    train_df: DataFrame,
) -> None:
    info = FieldInfo("origin", "categorical", 1, column="origin", column_type="string")
    df = train_df.repartition(40)
    for buckets, tasks in ((BUCKETS, 4), (128 * 10, 10)):  # local[2]
        assert count_values(df, [info], buckets).rdd.getNumPartitions() == tasks


def test_hashed_beyond_32_bits_is_refused() -> None:
    settings = {"name": "origin", "kind": "categorical"}
    assert fields_of([settings | {"hashed": 2**31 - 2}])
    with pytest.raises(ValidationError, match="hashed"):
        fields_of([settings | {"hashed": 2**31 - 1}])


USERS = {f"user {n:03}": 2 + n for n in range(200)}  # texts of 8 bytes, seen 2 to 201 times
ITEMS = {f"item {n:03}": 500 for n in range(20)}
CUTS = {"user": 2, "item": 2}
TEXT = 8


@pytest.fixture(scope="module")
def counts_df(spark: SparkSession) -> DataFrame:
    """Counts of USERS and ITEMS, by two tasks, and of rare and missing values."""
    rows = [(name, None, 9) for name in CUTS] + [(name, "rare", 1) for name in CUTS]
    for name, values in {"user": USERS, "item": ITEMS}.items():
        rows += [(name, value, part) for value, n in values.items() for part in (1, n - 1)]
    rows_df = spark.createDataFrame(rows, "field string, value string, count long")
    hashed = F.when(F.col("value").isNotNull(), F.xxhash64("value")).alias("hash")
    return bundled(rows_df.select("*", hashed), BUCKETS).persist()


def test_kept_values_are_in_the_order_of_their_counts(counts_df: DataFrame) -> None:
    ranked = rank(counts_df, CUTS)
    user, item = ranked["user"], ranked["item"]
    assert user.values is not None
    assert item.values is not None
    assert user.values.to_pylist() == sorted(USERS, reverse=True)
    assert user.counts.tolist() == list(range(201, 1, -1))
    assert item.values.to_pylist() == sorted(ITEMS)  # equal counts
    assert user.hashes.tolist() == [hash_text(value) for value in user.values.to_pylist()]
    assert (user.missing, user.other) == (9, 1)
    vocabulary = to_vocabulary(ranked)
    assert list(vocabulary.entries) == ["item", "user"]
    hashes = np.array([hash_text("user 199"), hash_text("user 000"), hash_text("rare")])
    assert vocabulary.look_up("user", hashes).tolist() == [2, 201, 1]


def test_a_vocabulary_that_does_not_fit_is_refused_before_it_is_collected(
    counts_df: DataFrame,
) -> None:
    each = memory.bytes_a_value(2) + memory.TEXTS * TEXT  # local[2]
    with pytest.raises(LcSparkError) as error:
        rank(counts_df, CUTS, free=120 * each)
    said = str(error.value)
    assert "The vocabulary of 220 values needs" in said
    assert f"({each} bytes a value in the driver and its tasks)" in said
    assert "The fields with most values: 'user' 200, 'item' 20" in said
    # 100 users fit beside the items: those seen 102 times and more.
    assert "Set user: hashed: 64, or raise min_count there to 200." in said
    for free in (220 * each, 220 * each + each - 1):
        assert len(rank(counts_df, CUTS, free=free)["user"].hashes) == 200


def test_keys_that_do_not_fit_beside_the_values_are_refused(spark: SparkSession) -> None:
    each = memory.bytes_a_value(2)
    rows = [("cross", key or None, 1 + key) for key in range(21)]  # 0: all parents missing
    keys_df = bundled(spark.createDataFrame(rows, "field string, hash long, count long"), BUCKETS)
    ranked = rank(keys_df, {"cross": 2}, held=200, free=220 * each)["cross"]
    assert ranked.hashes.tolist() == list(range(20, 0, -1))
    assert (ranked.values, ranked.missing, ranked.other) == (None, 1, 0)
    assert rank(keys_df, {"cross": 99}, held=200, free=0)["cross"].other == 230  # none is kept
    with pytest.raises(LcSparkError, match="The vocabulary of 221 values"):
        rank(keys_df, {"cross": 2}, held=201, free=220 * each)


def test_the_min_count_that_is_named_makes_the_vocabulary_fit(counts_df: DataFrame) -> None:
    each = memory.bytes_a_value(2) + memory.TEXTS * TEXT
    with pytest.raises(LcSparkError, match="raise min_count there to 200"):
        rank(counts_df, CUTS, free=100 * each)
    ranked = rank(counts_df, {**CUTS, "user": 200}, free=100 * each)
    assert {name: len(found.hashes) for name, found in ranked.items()} == {"user": 2, "item": 20}
    with pytest.raises(LcSparkError, match=r"Set user: hashed: 64; item: hashed: 8, or"):
        rank(counts_df, CUTS, free=10 * each)
