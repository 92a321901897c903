"""Hashes texts as Spark's ``xxhash64`` does, without Spark: the same bytes give the same hash.

The function is XXH64 with seed 42 (Collet's specification, doc/xxhash_spec.md of xxHash). Library
xxhash takes a text at a time; for many, all texts of one length go through numpy together, some
ten times as fast.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

SEED = 42
FEW = 1000  # texts, below which one at a time is faster
STRIPE = 32  # bytes, from which on the function has another part, here only of the library
AT_ONCE = 1 << 14  # texts: what is written between two steps then stays in the cache
P1, P2, P3, P4, P5 = (
    np.uint64(prime)
    for prime in (
        0x9E3779B185EBCA87,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0x85EBCA77C2B2AE63,
        0x27D4EB2F165667C5,
    )
)
Words = NDArray[np.uint64]


def mix(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Spread int64 keys over all 64 bits (the finaliser of splitmix64, Steele et al. 2014)."""
    z = keys.view(np.uint64).copy()
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))).view(np.int64)


def hash_text(text: str) -> int | None:
    """Return Spark's xxhash64 of a string, as signed 64 bits; None for the empty string."""
    return _hash_bytes(text.encode(errors="replace"))


def hash_texts(texts: pa.Array) -> pa.Array:
    """Return int64 hashes [n] of texts [n], of any encoding; null for null and the empty string."""
    if len(texts) < FEW:
        return pa.array(map(_hash_bytes, texts.cast(pa.binary()).to_pylist()), pa.int64())
    wide = texts.cast(pa.large_binary())  # with offsets of 64 bits, whatever they were
    _, at, content = wide.buffers()
    offsets = np.frombuffer(at, np.int64)[wide.offset : wide.offset + len(texts) + 1]
    lengths = np.diff(offsets)
    hashes = np.zeros(len(texts), np.uint64)
    for length, rows in _by_length(np.minimum(lengths, STRIPE)):
        if length == STRIPE:
            for row in rows.tolist():
                text = content[int(offsets[row]) : int(offsets[row + 1])]
                hashes[row] = xxhash.xxh64_intdigest(text, SEED)
        elif length:
            hashes[rows] = _hash_short(content, offsets[rows], length)
    missing = (lengths == 0) | pc.is_null(texts).to_numpy(zero_copy_only=False)
    return pa.array(hashes.view(np.int64), mask=missing)


def _hash_bytes(text: bytes | None) -> int | None:
    if not text:
        return None
    value = xxhash.xxh64_intdigest(text, SEED)
    return value - 2**64 if value >= 2**63 else value


def _by_length(lengths: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield each length and some of the rows that have it."""
    order = np.argsort(lengths.astype(np.uint8), kind="stable")
    ends = np.cumsum(np.bincount(lengths)).tolist()
    for length, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        for at in range(first, last, AT_ONCE):
            yield length, order[at : min(at + AT_ONCE, last)]


def _hash_short(content: pa.Buffer, starts: NDArray[np.int64], length: int) -> Words:
    """Return XXH64 of texts of one length below STRIPE that begin at starts."""
    hashes = np.full(len(starts), np.uint64(SEED + length) + P5)
    at = 0
    while at + 8 <= length:
        hashes ^= _rotated(_words(content, "<u8", starts + at) * P2, 31) * P1
        hashes = _rotated(hashes, 27) * P1 + P4
        at += 8
    if at + 4 <= length:
        hashes ^= _words(content, "<u4", starts + at) * P1
        hashes = _rotated(hashes, 23) * P2 + P3
        at += 4
    for place in range(at, length):
        hashes ^= _words(content, "u1", starts + place) * P5
        hashes = _rotated(hashes, 11) * P1
    for shift, prime in ((33, P2), (29, P3)):
        hashes ^= hashes >> np.uint64(shift)
        hashes *= prime
    hashes ^= hashes >> np.uint64(32)
    return hashes


def _words(content: pa.Buffer, kind: str, starts: NDArray[np.int64]) -> Words:
    """Return the numbers of a kind that begin at any bytes of a buffer."""
    size = np.dtype(kind).itemsize
    shape, strides = (len(content) - size + 1,), (1,)
    everywhere: NDArray[Any] = np.ndarray(shape, kind, content, strides=strides)
    return everywhere[starts].astype(np.uint64)


def _rotated(words: Words, bits: int) -> Words:
    return (words << np.uint64(bits)) | (words >> np.uint64(64 - bits))
