"""Counts of one task: what is added up, and what is sent on, in which bundles."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from lc_spark.features import counts
from lc_spark.features.counts import BUCKETS, Counts, buckets_for, bundled, unbundled
from lc_spark.hashing import hash_text, mix

WORDS = [*(f"word {n}" for n in range(100)), None, None]


def add(held: Counts, name: str, values: Sequence[str | int | None]) -> None:
    kind = pa.string() if isinstance(values[0], str) else pa.int64()
    held.add(name, pa.array(values, kind), pa.array([1] * len(values)))


def mixed(key: int) -> int:
    return int(mix(np.array([key]))[0]) % 2**64


@pytest.mark.parametrize(
    ("values", "hashes"),
    [
        (WORDS, [word and hash_text(word) for word in WORDS]),
        ([*range(1, 100), 2**62, None], [*range(1, 100), 2**62, None]),
    ],
    ids=["texts", "keys"],
)
def test_a_bundle_has_the_values_of_one_bucket_with_their_hashes(
    values: Sequence[str | int | None], hashes: list[int | None]
) -> None:
    held = Counts("seen", 7)
    add(held, "first", values)
    add(held, "second", values[:1])
    bundles = list(held.give())
    buckets = [batch["bucket"][0].as_py() for batch in bundles]
    assert buckets == sorted(set(buckets))
    rows = []
    for bucket, batch in zip(buckets, bundles, strict=True):
        found = unbundled([batch["bundle"][0].as_py()]).to_pylist()
        assert {mixed(row["hash"] or 0) % 7 for row in found} == {bucket}
        rows += found
    assert {row["seen"] for row in rows} == {1}
    assert [row["hash"] for row in rows if row["field"] == "second"] == hashes[:1]
    firsts = [row for row in rows if row["field"] == "first"]
    texts = values if values is WORDS else [None] * len(values)
    assert Counter((r["hash"], r.get("value")) for r in firsts) == Counter(
        zip(hashes, texts, strict=True)
    )
    assert list(held.give()) == []  # nothing is left


def test_values_that_come_again_are_added_up_and_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "HELD_COUNTS", 1000)
    held = Counts("count", BUCKETS)
    for _ in range(50):
        add(held, "word", WORDS)
        assert list(held.relieve()) == []
        assert held.size <= 1000
    rows = [r for b in held.give() for r in unbundled([b["bundle"][0].as_py()]).to_pylist()]
    found: Counter[str | None] = Counter()
    for row in rows:
        found[row["value"]] += row["count"]
    assert found == Counter({word: 50 * n for word, n in Counter(WORDS).items()})
    assert len(rows) <= 1000


@pytest.mark.parametrize(("limit", "most"), [("HELD_COUNTS", 1000), ("HELD_BYTES", 16 * 1000)])
def test_many_values_that_differ_are_sent_on(
    limit: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts, limit, most)
    held = Counts("count", BUCKETS)
    sent = 0
    for part in range(20):
        add(held, "key", list(range(100 * part, 100 * part + 100)))
        bundles = list(held.relieve())
        sent += sum(len(unbundled([b["bundle"][0].as_py()])) for b in bundles)
        assert held.size <= 1000
    assert sent >= 1000
    assert sent + held.size == 2000


def test_a_bucket_of_a_large_log_is_a_batch_that_spark_can_hand_on() -> None:
    assert buckets_for(1000) == BUCKETS
    for cells in (158 * 11_035_501, 2311 * 110_229_536, 158 * 10**10):
        assert cells / buckets_for(cells) <= 2**30 / 128  # bytes: of a batch, of a cell


def test_keys_of_any_size_are_spread_over_the_buckets(spark: SparkSession) -> None:
    rows = [("cross", 128 * n + 1, n) for n in range(2000)]
    df = bundled(spark.createDataFrame(rows, "field string, hash long, count long"), BUCKETS)
    assert df.select("bucket").distinct().count() == BUCKETS


def test_a_bundle_names_the_fields_of_its_own_rows() -> None:
    held = Counts("count", 1000)
    for n in range(200):
        add(held, f"field {n}", [n])
    for batch in held.give():
        found = unbundled([batch["bundle"][0].as_py()])
        assert len(found["field"].combine_chunks().dictionary) <= len(found)
