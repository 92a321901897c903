"""Many texts hashed at once have the hashes that library xxhash and Spark give to each."""

import pyarrow as pa
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from lc_spark import hashing
from lc_spark.hashing import hash_text, hash_texts

TEXTS = st.lists(st.none() | st.binary(max_size=40), min_size=1, max_size=30)


def one_by_one(text: bytes | None) -> int | None:
    if not text:
        return None
    value = xxhash.xxh64_intdigest(text, hashing.SEED)
    return value if value < 2**63 else value - 2**64


@given(TEXTS, st.sampled_from([pa.binary(), pa.large_binary()]))
def test_many_at_once_are_hashed_as_one_by_one(
    texts: list[bytes | None], kind: pa.DataType
) -> None:
    many = texts * (hashing.FEW // len(texts) + 1)
    # A slice: its buffers begin before it.
    column = pa.array([b"before", *many, b"after"], kind).slice(1, len(many))
    expected = [one_by_one(text) for text in many]
    assert hash_texts(column).to_pylist() == expected
    assert hash_texts(column.slice(0, len(texts))).to_pylist() == expected[: len(texts)]


def test_spark_gives_the_same(spark: SparkSession) -> None:
    texts = ["é" * n + "東" * (n % 5) + str(n) for n in range(hashing.FEW)]
    df = spark.createDataFrame([(text,) for text in texts], "text string")
    found = [row[0] for row in df.select(F.xxhash64("text")).collect()]
    assert hash_texts(pa.array(texts)).to_pylist() == found
    assert [hash_text(text) for text in texts] == found


@pytest.mark.parametrize("n", [hashing.FEW, 2 * hashing.AT_ONCE + 1])
def test_texts_alike_in_length_are_all_hashed(n: int) -> None:
    texts = [f"{number:08}" for number in range(n)]
    assert hash_texts(pa.array(texts)).to_pylist() == [hash_text(text) for text in texts]
