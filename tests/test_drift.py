"""Counts of encoded rows by group, and the index that says how far two of them differ."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from lc_spark.features import drift
from lc_spark.features.drift import FieldCounts
from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.files import children

FIELDS = FieldMap(
    (
        FieldInfo("site", "categorical", 500),
        FieldInfo("few", "categorical", 4),
        FieldInfo("hashed", "categorical", 101, hashed=100),
        FieldInfo("price", "bucketed", 6),
        FieldInfo("fine", "bucketed", 41),
        FieldInfo("size", "continuous", 2),
        FieldInfo("tags", "multivalued", 30, max_values=3),
    )
)
Encoded = dict[str, np.ndarray[Any, Any]]
GROUPS = st.lists(st.integers(0, 1000), min_size=2, max_size=12).filter(sum).map(np.array)


def pair(draw: Callable[..., Any]) -> tuple[Any, Any]:
    n = draw(st.integers(2, 12))
    counts = st.lists(st.integers(0, 1000), min_size=n, max_size=n).filter(sum).map(np.array)
    return draw(counts), draw(counts)


PAIRS = st.composite(pair)()


def encoded(n: int, seed: int = 1) -> Encoded:
    random = np.random.default_rng(seed)
    sizes = {info.name: info.size for info in FIELDS.fields}
    columns: Encoded = {
        name: random.integers(0, sizes[name], n).astype(np.int32)
        for name in ("site", "few", "hashed", "price", "fine")
    }
    columns["size"] = random.normal(size=n).astype(np.float32)
    columns["size"][::10] = np.nan
    columns["tags"] = random.integers(1, 30, (n, 3)).astype(np.int32)
    columns["tags"][::2, 2] = -1
    columns["tags"][::4] = (0, -1, -1)
    return columns


def counted(columns: Encoded) -> FieldCounts:
    return drift.by_field(drift.count(columns, FIELDS), FIELDS, len(columns["site"]))


def test_every_value_is_counted_in_its_group() -> None:
    columns = {
        "site": np.array([0, 1, 2, 21, 22, 499, 499], np.int32),
        "few": np.array([0, 1, 2, 3, 3, 3, 3], np.int32),
        "hashed": np.array([0, 1, 5, 6, 96, 100, 100], np.int32),
        "price": np.array([0, 1, 2, 3, 4, 5, 5], np.int32),
        "fine": np.array([0, 1, 2, 3, 39, 40, 40], np.int32),
        "size": np.array([np.nan, -9, -1.2, -0.001, 0.001, 1.3, 9], np.float32),
        "tags": np.array([[0, -1, -1], [1, 2, 3], *[[1, 29, -1]] * 5], np.int32),
    }
    groups = {name: counts.tolist() for name, counts in counted(columns).groups.items()}
    # missing, out of vocabulary, the first 20 values, the rest
    assert groups["site"] == [1, 1, 1, *[0] * 18, 1, 3]
    assert groups["few"] == [1, 1, 1, 4]
    assert groups["hashed"] == [1, 2, 1, *[0] * 17, 3]  # five neighbours each
    assert groups["price"] == [1, 1, 1, 1, 1, 2]
    assert groups["fine"] == [1, 2, 1, *[0] * 17, 3]  # two neighbours each
    assert groups["size"] == [1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 2]
    assert groups["tags"] == [1, 6, 1, 1, *[0] * 18, 5]


def test_the_deciles_of_a_standard_normal_hold_a_tenth_each() -> None:
    values = np.random.default_rng(1).normal(size=100_000).astype(np.float32)
    columns = encoded(100_000) | {"size": values}
    shares = counted(columns).groups["size"] / 100_000
    np.testing.assert_allclose(shares[1:], 0.1, atol=0.005)


def test_counts_of_parts_add_up_to_those_of_the_whole() -> None:
    columns = encoded(1000)
    parts = [{k: v[rows] for k, v in columns.items()} for rows in (slice(0, 300), slice(300, 1000))]
    total = sum(drift.count(part, FIELDS) for part in parts)
    np.testing.assert_array_equal(total, drift.count(columns, FIELDS))
    none = {name: values[:0] for name, values in columns.items()}
    assert not drift.count(none, FIELDS).any()


def test_counts_survive_the_file() -> None:
    before = counted(encoded(100))
    after = FieldCounts.from_json(before.to_json())
    assert (after.fingerprint, after.rows) == (FIELDS.fingerprint, 100)
    for name, counts in before.groups.items():
        np.testing.assert_array_equal(after.groups[name], counts)
    assert json.loads(before.to_json())["groups"]["few"] == before.groups["few"].tolist()


@given(GROUPS, st.integers(1, 9))
def test_equal_shares_have_no_drift(counts: Any, times: int) -> None:
    assert drift.psi(counts, counts * times) == pytest.approx(0, abs=1e-12)


@given(PAIRS)
def test_the_index_is_the_same_both_ways_and_never_below_zero(counts: tuple[Any, Any]) -> None:
    there, back = drift.psi(*counts), drift.psi(*counts[::-1])
    assert there == pytest.approx(back, abs=1e-12)
    assert there >= 0
    assert np.isfinite(there)


@given(PAIRS)
def test_the_index_grows_with_the_way_gone(counts: tuple[Any, Any]) -> None:
    start, end = (part / part.sum() for part in counts)
    indices = [drift.psi(start, start + way * (end - start)) for way in (0, 0.2, 0.5, 0.8, 1)]
    assert indices == pytest.approx(sorted(indices), abs=1e-12)
    if np.abs(end - start).max() > 0.01:
        assert indices[-1] > indices[1] > 0


def test_the_index_by_hand() -> None:
    # (.5 - .25) ln 2 + (.5 - .75) ln (2/3)
    assert drift.psi(np.array([1, 1]), np.array([25, 75])) == pytest.approx(0.274653, abs=1e-6)


def test_chance_is_the_mean_index_of_two_samples_of_one_population() -> None:
    random = np.random.default_rng(1)
    shares = np.full(11, 1 / 11)
    before, now = random.multinomial(5000, shares, 500), random.multinomial(400, shares, 500)
    pairs = list(zip(before, now, strict=True))
    mean = np.mean([drift.psi(*pair) for pair in pairs])
    assert mean == pytest.approx(drift.psi_by_chance(*pairs[0]), rel=0.1)


def test_a_field_that_changed_is_found_and_no_other() -> None:
    train, scored = encoded(20_000), encoded(800, seed=2)
    assert not drift.drifted(drift.compare(counted(train), counted(scored), FIELDS), 0.2)
    scored["price"] = np.minimum(scored["price"], 3)
    scored["few"][:80] = 1
    scored["site"][:400] = 1
    found = drift.compare(counted(train), counted(scored), FIELDS)
    assert [one.psi for one in found] == sorted((one.psi for one in found), reverse=True)
    assert {one.field for one in drift.drifted(found, 0.2)} == {"price", "site"}
    site = next(one for one in found if one.field == "site")
    assert site.unseen_train == pytest.approx(1 / 500, abs=0.002)
    assert site.unseen == pytest.approx(0.5, abs=0.01)
    assert next(one for one in found if one.field == "price").unseen is None


def test_shards_are_counted_as_their_rows_are(spark: SparkSession, tmp_path: Path) -> None:
    columns = encoded(1000)
    rows = list(zip(*(columns[info.name].tolist() for info in FIELDS.fields), strict=True))
    kinds = {"continuous": "float", "multivalued": "array<int>"}
    schema = ", ".join(f"{i.name} {kinds.get(i.kind, 'int')}" for i in FIELDS.fields)
    spark.createDataFrame(rows, schema).repartition(3).write.parquet(str(tmp_path / "parts"))
    counts = drift.count_shards(spark, children(tmp_path / "parts", "*.parquet"), FIELDS)
    assert counts.rows == 1000
    assert counts.fingerprint == FIELDS.fingerprint
    for name, expected in counted(columns).groups.items():
        np.testing.assert_array_equal(counts.groups[name], expected)
