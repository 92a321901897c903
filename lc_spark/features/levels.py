"""Names the levels of fields: what each index of each field stands for, as people read it."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from lc_spark import files, tables
from lc_spark.config import Config
from lc_spark.features.ranking import FIRST, Ranked
from lc_spark.field_map import FieldInfo, FieldMap

MISSING_LEVEL = "(missing)"
OTHER_LEVEL = "(other)"
VALUE_LEVEL = "(value)"  # the weight that multiplies a continuous value
ROWS_AT_ONCE = 1 << 20  # the names of a cross are long: only so many at a time
SCHEMA = pa.schema(
    [
        ("field", pa.string()),
        ("index", pa.int32()),
        ("value", pa.large_string()),
        ("hash", pa.int64()),
        ("count", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Levels:
    """All levels of a field map, d rows, with the train rows that each is in."""

    field_map: FieldMap
    ranked: Mapping[str, Ranked]  # of the fields with a vocabulary
    counts: Mapping[str, NDArray[np.int64]]  # [size] of the others

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield (field, index, value, hash, count), fields and indices in order.

        hash is that of the value, or the key of a cross; null where there is none.
        """
        for info in self.field_map.fields:
            names = self._cross_names(info) if info.name in self._crosses else [self._names(info)]
            at = 0
            for part in names:
                for values in _slices(part):
                    indices = np.arange(at, at + len(values), dtype=np.int32)
                    hashes, counts = self._numbers(info, at, at + len(values))
                    field = pa.repeat(info.name, len(values))
                    columns = [field, pa.array(indices), values, hashes, counts]
                    yield pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
                    at += len(values)

    @property
    def _crosses(self) -> set[str]:
        return {i.name for i in self.field_map.fields if i.kind == "crossed" and i.hashed is None}

    def _numbers(self, info: FieldInfo, first: int, last: int) -> tuple[pa.Array, pa.Array]:
        """Return the hashes and the counts of some of a field's indices."""
        if (ranked := self.ranked.get(info.name)) is None:
            return pa.nulls(last - first, pa.int64()), pa.array(self.counts[info.name][first:last])
        few = max(0, min(FIRST, last) - first)  # of the indices without a value
        own = slice(max(first, FIRST) - FIRST, max(last, FIRST) - FIRST)
        special = np.array([ranked.missing, ranked.other])[first : first + few]
        hashes = pa.concat_arrays([pa.nulls(few, pa.int64()), pa.array(ranked.hashes[own])])
        return hashes, pa.array(np.concatenate([special, ranked.counts[own]]))

    def _names(self, info: FieldInfo) -> pa.Array:
        """Return the names of all levels of a field that is no cross, or a hashed one."""
        if info.kind == "continuous":
            return _texts([MISSING_LEVEL, VALUE_LEVEL])
        if info.kind == "bucketed":
            return _texts(_bucket_names(info))
        if info.hashed is not None:
            numbers = pa.array(range(1, info.size)).cast(pa.large_string())
            slots = _joined(pa.scalar("#", pa.large_string()), numbers, by="")
            return pa.concat_arrays([_texts([MISSING_LEVEL]), slots])
        values = self.ranked[info.name].values
        return pa.concat_arrays([_texts([MISSING_LEVEL, OTHER_LEVEL]), values])

    def _cross_names(self, info: FieldInfo) -> Iterator[pa.Array]:
        """Yield the names of a cross by its parents' levels, such as 'JFK × LAX', in parts."""
        yield _texts([MISSING_LEVEL, OTHER_LEVEL])
        parents = [self.field_map[name] for name in info.of]
        names = [self._names(parent) for parent in parents]
        keys = self.ranked[info.name].hashes
        for at in range(0, len(keys), ROWS_AT_ONCE):
            rest = keys[at : at + ROWS_AT_ONCE]
            parts: list[pa.Array] = []
            for parent, texts in zip(reversed(parents), reversed(names), strict=True):
                rest, indices = np.divmod(rest, parent.size)
                parts.insert(0, texts.take(pa.array(indices)))
            yield _joined(*parts, by=" × ")


def _slices(texts: pa.Array) -> Iterator[pa.Array]:
    for at in range(0, len(texts), ROWS_AT_ONCE):
        yield texts.slice(at, ROWS_AT_ONCE)


def _texts(texts: list[str]) -> pa.Array:
    return pa.array(texts, pa.large_string())


def _joined(*parts: pa.Array, by: str) -> pa.Array:
    return pc.binary_join_element_wise(*parts, pa.scalar(by, pa.large_string()))


def _bucket_names(info: FieldInfo) -> list[str]:
    edges = ["-inf", *(f"{cut:.6g}" for cut in info.cut_points), "inf"]
    pairs = itertools.pairwise(edges)
    return [MISSING_LEVEL, *(f"[{low}, {high})" for low, high in pairs)]


def write_levels(spark: SparkSession, levels: Levels, config: Config) -> int:
    """Write the table ``vocabulary``, by way of a Parquet file; return its version."""
    path = config.run_path / "levels.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("wb") as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
            for batch in levels.batches():
                writer.write_batch(batch)
        return tables.write(spark.read.parquet(files.uri(path)), config, "vocabulary")
    finally:
        path.unlink(missing_ok=True)
