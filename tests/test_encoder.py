"""The encoder and the field map: raw pandas rows to indices, and what the fingerprint holds."""

import dataclasses
import datetime
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lc_spark.encoder import Vocabulary, cross_keys, encode
from lc_spark.errors import LcSparkError
from lc_spark.features.fit import check_cross_fits
from lc_spark.field_map import FieldInfo, FieldMap, require_same
from lc_spark.hashing import hash_text
from lc_spark.pandas_rows import prepare_pandas

NAN, INF = math.nan, math.inf


def vocabulary_of(**words: list[str]) -> Vocabulary:
    """Return a vocabulary in which the first word of a field has index 2."""
    rows = [(f, hash_text(w), i) for f, ws in words.items() for i, w in enumerate(ws, start=2)]
    fields, hashes, indices = zip(*rows, strict=True)
    return Vocabulary.from_arrow(
        pa.table({"field": fields, "hash": hashes, "index": pa.array(indices, pa.int32())})
    )


def encode_column(info: FieldInfo, values: list[Any], vocabulary: Vocabulary) -> NDArray[Any]:
    raw = pd.DataFrame({info.column: pd.Series(values, dtype=object)})
    field_map = FieldMap((info,))
    return encode(prepare_pandas(raw, field_map), field_map, vocabulary)[info.name]


# --- categorical ---

SITE = FieldInfo("site", "categorical", 7, column="site", column_type="string")
SITES = vocabulary_of(site=["JFK", "LAX", "東京", "a|b", " "])


@pytest.mark.parametrize(
    ("value", "index"),
    [
        (None, 0),
        ("", 0),
        (NAN, 0),
        (pd.NA, 0),
        ("SFO", 1),
        ("jfk", 1),
        ("JFK ", 1),
        ("JFK", 2),
        ("LAX", 3),
        ("東京", 4),
        ("a|b", 5),
        ("a", 1),
        (" ", 6),
        (7, 1),
        ("\ud800", 1),  # half a surrogate pair, as JSON can carry it
    ],
)
def test_a_categorical_value_gets_its_index(value: object, index: int) -> None:
    assert encode_column(SITE, [value], SITES).tolist() == [index]


@pytest.mark.parametrize(
    ("column_type", "value", "index"),
    [
        ("int", 1545, 2),
        ("int", 1545.0, 2),  # pandas makes doubles of integers beside missing values
        ("bigint", np.int64(1545), 2),
        ("double", 1545.0, 2),
        ("double", 1545, 2),
        ("double", -0.0, 6),
        ("double", NAN, 0),
        ("double", 2.0**60, 7),
        ("double", INF, 8),
        ("double", -INF, 1),
        ("string", 1545, 2),  # from JSON, or from pandas guessing the type
        ("string", "1545.0", 1),
        ("int", "1545", 2),
        ("boolean", True, 3),
        ("boolean", np.bool_(False), 4),
        ("boolean", None, 0),
        ("date", datetime.date(2013, 1, 2), 5),
        ("date", "2013-01-02", 5),
        ("date", pd.Timestamp("2013-01-02 10:00"), 5),
        ("date", pd.NaT, 0),
    ],
)
def test_a_value_of_any_type_gets_the_index_of_its_text(
    column_type: str, value: object, index: int
) -> None:
    texts = ["1545", "true", "false", "2013-01-02", "0", str(2**60), "Infinity"]
    info = FieldInfo("v", "categorical", 9, column="v", column_type=column_type)
    assert encode_column(info, [value], vocabulary_of(v=texts)).tolist() == [index]


@pytest.mark.parametrize(
    ("column_type", "value"),
    [
        ("int", "many"),
        ("boolean", "true"),
        ("date", "yesterday"),
        ("date", 20130102),
        ("string", ["a", "list"]),
    ],
)
def test_a_value_of_another_type_is_an_error_that_names_the_column(
    column_type: str, value: object
) -> None:
    info = FieldInfo("v", "categorical", 2, column="raw_v", column_type=column_type)
    with pytest.raises(LcSparkError, match=rf"'raw_v' must hold.*{column_type}"):
        encode_column(info, [value], SITES)


def test_hashed_values_fall_into_one_to_hashed_and_need_no_vocabulary() -> None:
    info = dataclasses.replace(SITE, hashed=1000, size=1001)
    values = ["JFK", None, "東京", "", "a|b"]
    # xxhash64 as unsigned, modulo 1000, plus 1.
    assert encode_column(info, values, SITES).tolist() == [169, 0, 304, 0, 616]
    many = encode_column(info, [f"user {i}" for i in range(20_000)], SITES)
    assert (many.min(), many.max()) == (1, 1000)


def test_hash_text_is_xxhash64_with_sparks_seed() -> None:
    # SELECT xxhash64('JFK'), xxhash64('東京')
    assert [hash_text("JFK"), hash_text("東京")] == [5255761036782674168, -5717548859056045313]
    assert hash_text("") is None


# --- multivalued ---

TAGS = FieldInfo("tags", "multivalued", 6, column="tags", column_type="array<string>", max_values=3)
TAG_WORDS = vocabulary_of(tags=["news", "sport", "a|b", "東京"])


@pytest.mark.parametrize(
    ("value", "indices"),
    [
        (None, [0, -1, -1]),
        (NAN, [0, -1, -1]),
        (pd.NA, [0, -1, -1]),
        ([], [0, -1, -1]),
        ([None], [0, -1, -1]),
        ([""], [0, -1, -1]),
        (["news"], [2, -1, -1]),
        (["sport", "news"], [2, 3, -1]),
        (["sport", None, "", "news"], [2, 3, -1]),
        (["news", "news"], [2, -1, -1]),  # a set
        (["new", "newer", "news"], [1, 2, -1]),  # two rare values are one index
        (["東京", "a|b", "sport", "news"], [2, 3, 4]),  # the most frequent stay
        (["a|b"], [4, -1, -1]),  # an array is not split at a separator
        (("news", "sport"), [2, 3, -1]),
        (np.array(["news", "sport"], dtype=object), [2, 3, -1]),
    ],
)
def test_an_array_becomes_a_padded_list_of_indices(value: object, indices: list[int]) -> None:
    assert encode_column(TAGS, [value], TAG_WORDS).tolist() == [indices]


@pytest.mark.parametrize(
    ("value", "indices"),
    [
        (None, [0, -1, -1]),
        ("", [0, -1, -1]),
        ("|", [0, -1, -1]),
        ("news", [2, -1, -1]),
        ("sport|news", [2, 3, -1]),
        ("|sport||news|", [2, 3, -1]),
        ("東京|unseen", [1, 5, -1]),
        ("a|b", [1, -1, -1]),  # the separator in a value cuts it
        ("a.b", [1, -1, -1]),
    ],
)
def test_a_delimited_string_is_split(value: object, indices: list[int]) -> None:
    info = dataclasses.replace(TAGS, column_type="string", delimiter="|")
    assert encode_column(info, [value], TAG_WORDS).tolist() == [indices]


def test_rows_of_a_multivalued_field_do_not_mix() -> None:
    values = [["sport"], None, ["news", None], [], ["news", "sport", "a|b", "東京"], [None, None]]
    expected = [[3, -1, -1], [0, -1, -1], [2, -1, -1], [0, -1, -1], [2, 3, 4], [0, -1, -1]]
    assert encode_column(TAGS, values, TAG_WORDS).tolist() == expected


def test_arrays_of_numbers_are_values_too() -> None:
    words = vocabulary_of(tags=["7", "8"])
    integers = dataclasses.replace(TAGS, column_type="array<bigint>")
    doubles = dataclasses.replace(TAGS, column_type="array<double>")
    assert encode_column(integers, [[8, 7], [9]], words).tolist() == [[2, 3, -1], [1, -1, -1]]
    assert encode_column(doubles, [[8.0, NAN]], words).tolist() == [[3, -1, -1]]


def test_a_hashed_multivalued_field() -> None:
    info = dataclasses.replace(TAGS, hashed=1000, size=1001)
    indices = encode_column(info, [["東京", "JFK", None], None], TAG_WORDS)
    assert indices.tolist() == [[169, 304, -1], [0, -1, -1]]


def test_a_number_where_lists_belong_is_an_error() -> None:
    with pytest.raises(LcSparkError, match=r"'tags' must hold.*: 3 is no list of values"):
        encode_column(TAGS, [3], TAG_WORDS)


# --- bucketed and continuous ---


@pytest.mark.parametrize(
    ("value", "index"),
    [
        (None, 0),
        (NAN, 0),
        (-INF, 1),
        (-1e308, 1),
        (-0.001, 1),
        (0, 2),  # a cut point belongs to the bucket above it
        (-0.0, 2),
        (9.999, 2),
        (10, 3),
        (1e308, 3),
        (INF, 3),
        ("10", 3),
        (True, 2),
    ],
)
def test_a_number_gets_its_bucket(value: object, index: int) -> None:
    info = FieldInfo("n", "bucketed", 4, column="n", column_type="double", cut_points=(0.0, 10.0))
    assert encode_column(info, [value], SITES).tolist() == [index]


def test_a_field_without_cut_points_has_one_bucket_and_missing() -> None:
    info = FieldInfo("n", "bucketed", 2, column="n", column_type="double")
    assert encode_column(info, [5.0, None, INF, -INF], SITES).tolist() == [1, 0, 1, 1]


def test_a_continuous_value_is_standardised_and_clipped_to_the_fitted_range() -> None:
    info = FieldInfo(
        "n", "continuous", 2, column="n", column_type="double", mean=10, sd=5, low=0, high=30
    )
    values = [10, 15, 0, 30, -7, 31, INF, -INF, None, NAN]
    expected = [0, 1, -2, 4, -2, 4, 4, -2, NAN, NAN]
    standardised = encode_column(info, values, SITES)
    assert standardised.dtype == np.float32
    np.testing.assert_array_equal(standardised, expected)


@pytest.mark.parametrize("kind", ["bucketed", "continuous"])
def test_text_in_a_numeric_column_is_an_error_that_names_the_column(kind: str) -> None:
    info = FieldInfo("n", kind, 2, column="raw_n", column_type="double")
    with pytest.raises(LcSparkError, match="'raw_n' must hold numbers"):
        encode_column(info, ["tall"], SITES)


# --- crosses ---

PARENTS = (
    FieldInfo("origin", "categorical", 4, column="origin", column_type="string"),
    FieldInfo("price", "bucketed", 3, column="price", column_type="double", cut_points=(10.0,)),
)
CROSS = FieldInfo("origin_x_price", "crossed", 4, of=("origin", "price"))
ORIGIN_HASHES = vocabulary_of(origin=["JFK", "LAX"]).entries
# Keys are origin * 3 + price: JFK and cheap 2 * 3 + 1 = 7, LAX and missing 3 * 3 + 0 = 9.
CROSS_WORDS = Vocabulary(
    {**ORIGIN_HASHES, "origin_x_price": (np.array([7, 9]), np.array([3, 2], np.int32))}
)
CROSS_ROWS = [
    # origin, price, key, index
    ("JFK", 5.0, 7, 3),
    ("LAX", None, 9, 2),
    ("LAX", 5.0, 10, 1),
    (None, 5.0, 1, 1),
    ("unseen", 50.0, 5, 1),
    (None, NAN, 0, 0),
    ("", None, 0, 0),
]


def encode_crosses(cross: FieldInfo) -> tuple[FieldMap, dict[str, NDArray[Any]]]:
    field_map = FieldMap((*PARENTS, cross))
    raw = pd.DataFrame([row[:2] for row in CROSS_ROWS], columns=["origin", "price"])
    return field_map, encode(prepare_pandas(raw, field_map), field_map, CROSS_WORDS)


def test_a_cross_is_made_of_its_parents_indices() -> None:
    field_map, encoded = encode_crosses(CROSS)
    assert cross_keys(CROSS, encoded, field_map).tolist() == [row[2] for row in CROSS_ROWS]
    assert encoded["origin_x_price"].tolist() == [row[3] for row in CROSS_ROWS]


def test_a_hashed_cross_spreads_its_combinations_and_keeps_missing_apart() -> None:
    _, encoded = encode_crosses(dataclasses.replace(CROSS, hashed=1000, size=1001))
    indices = encoded["origin_x_price"].tolist()
    assert indices[5:] == [0, 0]
    assert all(1 <= index <= 1000 for index in indices[:5])
    assert len(set(indices[:5])) == 5


@given(
    st.lists(st.integers(2, 50), min_size=2, max_size=4).flatmap(
        lambda sizes: st.tuples(
            st.just(sizes),
            st.lists(
                st.tuples(*[st.integers(0, size - 1) for size in sizes]), min_size=2, unique=True
            ),
        )
    )
)
def test_two_combinations_never_share_a_cross_key(
    drawn: tuple[list[int], list[tuple[int, ...]]],
) -> None:
    sizes, combinations = drawn
    names = [f"p{i}" for i in range(len(sizes))]
    parents = tuple(FieldInfo(n, "bucketed", s) for n, s in zip(names, sizes, strict=True))
    cross = FieldInfo("cross", "crossed", 2, of=tuple(names))
    columns = np.array(combinations, np.int32).T
    encoded = dict(zip(names, columns, strict=True))
    keys = cross_keys(cross, encoded, FieldMap((*parents, cross)))
    assert len(set(keys.tolist())) == len(combinations)
    all_missing = (columns == 0).all(axis=0)
    np.testing.assert_array_equal(keys == 0, all_missing)
    assert keys.min() >= 0
    assert keys.max() < math.prod(sizes)


def test_cross_keys_stay_apart_up_to_the_largest_combination() -> None:
    sizes = (2**31 - 1, 2**31 - 1)
    parents = tuple(FieldInfo(f"p{i}", "categorical", s) for i, s in enumerate(sizes))
    cross = FieldInfo("cross", "crossed", 2, of=("p0", "p1"))
    field_map = FieldMap((*parents, cross))
    check_cross_fits(cross, field_map)
    last = np.array([2**31 - 2], np.int32)
    assert cross_keys(cross, {"p0": last, "p1": last}, field_map).tolist() == [(2**31 - 1) ** 2 - 1]


def test_a_cross_with_too_many_combinations_is_refused_by_name() -> None:
    parents = tuple(FieldInfo(f"p{i}", "categorical", 2**21) for i in range(3))
    cross = FieldInfo("p0_x_p1_x_p2", "crossed", 2, of=("p0", "p1", "p2"))
    with pytest.raises(LcSparkError, match=r"'p0_x_p1_x_p2' has 9\.2e\+18 combinations"):
        check_cross_fits(cross, FieldMap((*parents, cross)))


# --- whole rows ---


def test_missing_columns_are_missing_values_in_every_field() -> None:
    field_map = FieldMap(
        (
            SITE,
            TAGS,
            *PARENTS,
            FieldInfo("x", "continuous", 2, column="x", column_type="double", high=1.0),
            CROSS,
        )
    )
    raw = pd.DataFrame({"something_else": [1, 2]})
    encoded = encode(prepare_pandas(raw, field_map), field_map, CROSS_WORDS)
    assert encoded["site"].tolist() == [0, 0]
    assert encoded["tags"].tolist() == [[0, -1, -1], [0, -1, -1]]
    assert encoded["price"].tolist() == [0, 0]
    assert np.isnan(encoded["x"]).all()
    assert encoded["origin_x_price"].tolist() == [0, 0]


def test_no_rows_encode_to_no_rows() -> None:
    field_map = FieldMap((SITE, TAGS, *PARENTS, CROSS))
    raw = pd.DataFrame({"site": [], "tags": [], "origin": [], "price": []})
    encoded = encode(prepare_pandas(raw, field_map), field_map, CROSS_WORDS)
    assert {name: values.shape for name, values in encoded.items()} == {
        "site": (0,),
        "tags": (0, 3),
        "origin": (0,),
        "price": (0,),
        "origin_x_price": (0,),
    }


@pytest.mark.parametrize("dtype", ["object", "string", "category"])
def test_the_pandas_type_of_a_text_column_does_not_matter(dtype: Any) -> None:
    raw = pd.DataFrame({"site": pd.Series(["LAX", None, "JFK"]).astype(dtype)})
    field_map = FieldMap((SITE,))
    assert encode(prepare_pandas(raw, field_map), field_map, SITES)["site"].tolist() == [3, 0, 2]


@pytest.mark.parametrize("dtype", ["Int64", "float32", "Float64", "object"])
def test_the_pandas_type_of_a_number_column_does_not_matter(dtype: Any) -> None:
    raw = pd.DataFrame({"price": pd.Series([9, None, 10]).astype(dtype)})
    field_map = FieldMap((PARENTS[1],))
    assert encode(prepare_pandas(raw, field_map), field_map, SITES)["price"].tolist() == [1, 0, 2]


def test_encoding_leaves_the_raw_rows_as_they_were() -> None:
    raw = pd.DataFrame({"site": ["JFK", None], "tags": [["news"], None], "origin": ["", "LAX"]})
    before = raw.copy(deep=True)
    field_map = FieldMap((SITE, TAGS, PARENTS[0]))
    encode(prepare_pandas(raw, field_map), field_map, SITES)
    pd.testing.assert_frame_equal(raw, before)


# --- vocabulary ---


def test_a_vocabulary_survives_arrow_and_its_digest_tells_any_change() -> None:
    table = SITES.to_arrow()
    again = Vocabulary.from_arrow(table)
    assert again.digest("site") == SITES.digest("site")
    backwards = Vocabulary.from_arrow(table.take(list(range(table.num_rows))[::-1]))
    assert backwards.digest("site") == SITES.digest("site")
    other_order = vocabulary_of(site=["LAX", "JFK", "東京", "a|b", " "])
    fewer = vocabulary_of(site=["JFK", "LAX", "東京", "a|b"])
    assert len({v.digest("site") for v in (SITES, other_order, fewer)}) == 3


@pytest.mark.parametrize("encoded", [False, True])
def test_entries_are_read_in_any_order_and_in_parts(encoded: bool) -> None:
    rows = [("b", 9, 2), ("a", 7, 3), ("b", None, 0), ("b", -4, 4), ("a", 1, 2), ("b", 0, 3)]
    parts = []
    for part in (rows[:2], rows[2:3], rows[3:]):  # the names of a part have their own dictionary
        fields, hashes, indices = zip(*part, strict=True)
        names = pa.array(fields, pa.string())
        columns = [names.dictionary_encode() if encoded else names]
        columns += [pa.array(hashes, pa.int64()), pa.array(indices, pa.int32())]
        parts.append(pa.table(columns, names=["field", "hash", "index"]))
    words = Vocabulary.from_arrow(pa.concat_tables(parts))
    found = {name: [e.tolist() for e in entries] for name, entries in words.entries.items()}
    assert found == {"a": [[1, 7], [2, 3]], "b": [[-4, 0, 9], [4, 3, 2]]}
    assert list(found) == ["a", "b"]
    assert {e.dtype.name for e in words.of("a")} == {"int64", "int32"}


def test_an_empty_vocabulary_survives_arrow_and_knows_nothing() -> None:
    empty = Vocabulary.from_arrow(Vocabulary({}).to_arrow())
    assert empty.entries == {}
    assert empty.look_up("site", np.array([5, 6])).tolist() == [1, 1]


def test_look_up_finds_the_smallest_and_largest_hash_and_nothing_beside_them() -> None:
    hashes = np.array([-(2**63), -5, 7, 2**63 - 1])
    words = Vocabulary({"f": (hashes, np.array([4, 2, 3, 5], np.int32))})
    asked = np.array([2**63 - 1, 7, 8, -(2**63), -6, -5])
    assert words.look_up("f", asked).tolist() == [5, 3, 1, 4, 1, 2]


# --- field map ---

FIELD_MAP = FieldMap(
    (
        SITE,
        dataclasses.replace(TAGS, delimiter="|"),
        FieldInfo("n", "bucketed", 4, column="n", column_type="int", cut_points=(0.1, 1e300)),
        FieldInfo("x", "continuous", 2, column="x", column_type="double", mean=1 / 3, sd=0.1),
        FieldInfo("site_x_n", "crossed", 9, of=("site", "n"), vocabulary_digest="0f"),
    )
)


def test_offsets_follow_the_sizes() -> None:
    assert [info.offset for info in FIELD_MAP.fields] == [0, 7, 13, 17, 19]
    assert FIELD_MAP.d == 28
    assert FIELD_MAP.raw_columns == {
        "site": "string",
        "tags": "array<string>",
        "n": "int",
        "x": "double",
    }


def test_a_field_map_survives_json_and_its_file(tmp_path: Path) -> None:
    FIELD_MAP.write(tmp_path / "deep" / "field_map.json")
    again = FieldMap.read(tmp_path / "deep" / "field_map.json")
    assert again == FIELD_MAP
    assert again.fingerprint == FIELD_MAP.fingerprint


def test_a_missing_field_map_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(LcSparkError, match="run the features stage first"):
        FieldMap.read(tmp_path / "field_map.json")


CHANGES: list[tuple[str, str, Any]] = [
    ("site", "name", "place"),
    ("site", "size", 8),
    ("site", "column", "place"),
    ("site", "column_type", "int"),
    ("site", "hashed", 6),
    ("tags", "delimiter", ";"),
    ("tags", "max_values", 4),
    ("n", "cut_points", (0.1, 1e299)),
    ("x", "mean", 0.3333),
    ("x", "sd", 0.1000001),
    ("x", "low", -1.0),
    ("x", "high", 1.0),
    ("site_x_n", "of", ("n", "site")),
    ("site_x_n", "vocabulary_digest", "0e"),
]


@pytest.mark.parametrize(("field", "key", "value"), CHANGES)
def test_the_fingerprint_changes_with_any_value(field: str, key: str, value: Any) -> None:
    changed = tuple(
        dataclasses.replace(info, **{key: value}) if info.name == field else info
        for info in FIELD_MAP.fields
    )
    assert FieldMap(changed).fingerprint != FIELD_MAP.fingerprint


def test_the_fingerprint_changes_with_the_order_and_not_otherwise() -> None:
    assert FieldMap(FIELD_MAP.fields[::-1]).fingerprint != FIELD_MAP.fingerprint
    assert FieldMap(FIELD_MAP.fields).fingerprint == FIELD_MAP.fingerprint


def test_a_field_map_changed_by_hand_is_refused() -> None:
    content = json.loads(FIELD_MAP.to_json())
    content["fields"][2]["cut_points"][0] = 0.2
    with pytest.raises(LcSparkError, match=f"{FIELD_MAP.fingerprint}.*changed by hand"):
        FieldMap.from_json(json.dumps(content))


def test_require_same_names_both_fingerprints() -> None:
    require_same("aaaa", "aaaa", "The model")
    with pytest.raises(
        LcSparkError, match=r"The model carries the fingerprint bbbb.*here has aaaa"
    ):
        require_same("aaaa", "bbbb", "The model")
