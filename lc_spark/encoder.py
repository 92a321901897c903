"""Turns prepared columns (hashes and numbers) into indices within fields, in numpy.

The one implementation of encoding: Spark's Python workers, the registered model and the tests all
call it. It needs neither Spark nor torch.
"""

import hashlib
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lc_spark import files
from lc_spark.field_map import MISSING, OUT_OF_VOCABULARY, PADDING, FieldInfo, FieldMap
from lc_spark.files import AnyPath
from lc_spark.hashing import mix

MANY_ROWS = 4096  # looked up at once, from which on a hash table of the vocabulary pays


@dataclass(frozen=True)
class Vocabulary:
    """Hash (or cross key) -> index, by field: two arrays each, sorted by hash."""

    entries: Mapping[str, tuple[NDArray[Any], NDArray[Any]]]  # int64 hashes, int32 indices
    # By field, made when first needed: a process that scores single rows never does.
    _tables: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def from_arrow(cls, table: pa.Table) -> "Vocabulary":
        """Read a table of (field string, hash int64, index int32); no hash, no entry.

        The names may be dictionary-encoded: one a row would take more than all the rest.
        """
        if table["hash"].null_count:
            table = table.filter(pc.is_valid(table["hash"]))
        column = table["field"]
        if not pa.types.is_dictionary(column.type):
            column = pc.dictionary_encode(column)
        encoded = column.unify_dictionaries().combine_chunks()
        codes, names = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
        hashes, indices = table["hash"].to_numpy(), table["index"].to_numpy()
        by_field = np.argsort(codes.astype(np.int32), kind="stable")
        ends = np.cumsum(np.bincount(codes, minlength=len(names)))
        entries = {}
        for name, code in sorted((name, code) for code, name in enumerate(names)):
            rows = by_field[0 if code == 0 else ends[code - 1] : ends[code]]
            if len(rows):
                rows = rows[np.argsort(hashes[rows], kind="stable")]
                entries[name] = (hashes[rows], indices[rows].astype(np.int32))
        return cls(entries)

    def to_arrow(self) -> pa.Table:
        """Return the table that from_arrow reads, its names dictionary-encoded."""
        empty = (np.zeros(0, np.int64), np.zeros(0, np.int32))
        parts = list(self.entries.values()) or [empty]
        lengths = [len(hashes) for hashes, _ in self.entries.values()]
        codes = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        names = pa.array(list(self.entries), pa.string())
        return pa.table(
            {
                "field": pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), names),
                "hash": np.concatenate([part[0] for part in parts]),
                "index": np.concatenate([part[1] for part in parts]),
            }
        )

    @classmethod
    def read(cls, path: AnyPath) -> "Vocabulary":
        """Read the vocabulary from a file."""
        with path.open("rb") as file:
            return cls.from_arrow(pq.read_table(file))

    def write(self, path: AnyPath) -> None:
        """Write the vocabulary to a file."""
        content = io.BytesIO()
        pq.write_table(self.to_arrow(), content)
        files.write_whole(path, content.getvalue())

    def digest(self, name: str) -> str:
        """Return hex digits that change with any entry of a field's vocabulary."""
        hashes, indices = self.of(name)
        content = hashes.astype("<i8").tobytes() + indices.astype("<i4").tobytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def of(self, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return a field's hashes and indices; empty when it has none."""
        return self.entries.get(name, (np.zeros(0, np.int64), np.zeros(0, np.int32)))

    def look_up(self, name: str, hashes: NDArray[Any]) -> NDArray[Any]:
        """Return int32 indices of int64 hashes; what is not in the vocabulary gets 1."""
        known, indices = self.of(name)
        if not len(known):
            return np.full(len(hashes), OUT_OF_VOCABULARY, np.int32)
        if len(hashes) < MANY_ROWS:
            at = np.searchsorted(known, hashes)
            at[at == len(known)] = 0
            return np.where(known[at] == hashes, indices[at], OUT_OF_VOCABULARY).astype(np.int32)
        if name not in self._tables:
            self._tables[name] = pd.Index(known)
        at = self._tables[name].get_indexer(hashes)  # a hash table: 3 to 6 times as fast
        return np.where(at >= 0, indices[at], OUT_OF_VOCABULARY).astype(np.int32)


def encode(
    columns: Mapping[str, pa.Array], field_map: FieldMap, vocabulary: Vocabulary
) -> dict[str, NDArray[Any]]:
    """Encode prepared columns, one entry a field that is no cross.

    columns holds int64 hashes (categorical; a dictionary of them will do), lists of them
    (multivalued) or float64 (bucketed, continuous), null where missing. Returns, for n rows: int32
    [n] indices, int32 [n, max_values] padded with -1 for multivalued fields, float32 [n]
    standardised values (NaN = missing) for continuous ones.
    """
    encoded: dict[str, NDArray[Any]] = {}
    for info in field_map.fields:
        if info.kind == "crossed":
            encoded[info.name] = _encode_cross(info, encoded, field_map, vocabulary)
        elif info.kind == "categorical":
            encoded[info.name] = _encode_categorical(info, columns[info.name], vocabulary)
        elif info.kind == "multivalued":
            encoded[info.name] = _encode_multivalued(info, columns[info.name], vocabulary)
        elif info.kind == "bucketed":
            encoded[info.name] = _encode_bucketed(info, columns[info.name])
        else:
            encoded[info.name] = _encode_continuous(info, columns[info.name])
    return encoded


def _indices_of(info: FieldInfo, hashes: NDArray[Any], vocabulary: Vocabulary) -> NDArray[Any]:
    if info.hashed is None:
        return vocabulary.look_up(info.name, hashes)
    return (hashes.view(np.uint64) % np.uint64(info.hashed) + np.uint64(1)).astype(np.int32)


def _encode_categorical(info: FieldInfo, column: pa.Array, vocabulary: Vocabulary) -> NDArray[Any]:
    if pa.types.is_dictionary(column.type):  # a value is looked up once, not once a row
        indices = _encode_categorical(info, column.dictionary, vocabulary)
        codes = pc.fill_null(column.indices, len(indices)).to_numpy(zero_copy_only=False)
        found: NDArray[Any] = np.append(indices, np.int32(MISSING))[codes]
        return found
    hashes = pc.fill_null(column, 0).to_numpy(zero_copy_only=False)
    indices = _indices_of(info, hashes, vocabulary)
    indices[pc.is_null(column).to_numpy(zero_copy_only=False)] = MISSING
    return indices


def _encode_multivalued(info: FieldInfo, column: pa.Array, vocabulary: Vocabulary) -> NDArray[Any]:
    padded = np.full((len(column), info.max_values), PADDING, np.int32)
    flat = pc.list_flatten(column).to_numpy(zero_copy_only=False)
    rows = pc.list_parent_indices(column).to_numpy(zero_copy_only=False).astype(np.int64)
    indices = _indices_of(info, flat, vocabulary)
    # A set a row: several rare values are one index; the most frequent (smallest) come first.
    pairs = np.unique(rows * np.int64(info.size) + indices)
    rows, indices = np.divmod(pairs, np.int64(info.size))
    starts = np.searchsorted(rows, rows)
    places = np.arange(len(rows)) - starts
    kept = places < info.max_values
    padded[rows[kept], places[kept]] = indices[kept]
    padded[padded[:, 0] == PADDING, 0] = MISSING
    return padded


def _numbers(column: pa.Array) -> NDArray[Any]:
    numbers: NDArray[Any] = pc.fill_null(column, math.nan).to_numpy(zero_copy_only=False)
    return numbers


def _encode_bucketed(info: FieldInfo, column: pa.Array) -> NDArray[Any]:
    values = _numbers(column)
    buckets = 1 + np.searchsorted(np.asarray(info.cut_points), values, side="right")
    return np.where(np.isnan(values), MISSING, buckets).astype(np.int32)


def _encode_continuous(info: FieldInfo, column: pa.Array) -> NDArray[Any]:
    # Clipped to the fitted range: one outlier or an infinity must not swamp the field sums.
    values = np.clip(_numbers(column), info.low, info.high)
    standardised: NDArray[Any] = ((values - info.mean) / info.sd).astype(np.float32)
    return standardised


def cross_keys(
    info: FieldInfo, encoded: Mapping[str, NDArray[Any]], field_map: FieldMap
) -> NDArray[Any]:
    """Return the int64 keys of a cross: its parents' indices as digits of mixed radix.

    Two different combinations never share a key; 0 means that every parent is missing.
    """
    keys = np.zeros(len(encoded[info.of[0]]), np.int64)
    for parent in info.of:
        keys = keys * field_map[parent].size + encoded[parent]
    return keys


def _encode_cross(
    info: FieldInfo,
    encoded: Mapping[str, NDArray[Any]],
    field_map: FieldMap,
    vocabulary: Vocabulary,
) -> NDArray[Any]:
    missing = np.logical_and.reduce([encoded[parent] == MISSING for parent in info.of])
    if info.hashed is None:
        keys = cross_keys(info, encoded, field_map)
    else:  # by the indices alone: the sizes of the parents may grow
        keys = np.zeros(len(missing), np.int64)
        for parent in info.of:
            keys = mix(keys + encoded[parent])
    return np.where(missing, MISSING, _indices_of(info, keys, vocabulary)).astype(np.int32)
