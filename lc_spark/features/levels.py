"""Names the levels of fields: what each index of each field stands for, as people read it."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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
from lc_spark.files import AnyPath

MISSING_LEVEL = "(missing)"
OTHER_LEVEL = "(other)"
VALUE_LEVEL = "(value)"  # the weight that multiplies a continuous value
ROWS_AT_ONCE = 1 << 20  # names of crosses are long: only so many at a time
SCHEMA = pa.schema(
    [
        ("field", pa.string()),
        ("index", pa.int32()),
        ("value", pa.large_string()),
        ("hash", pa.int64()),
        ("count", pa.int64()),
    ]
)

Namer = Callable[[NDArray[np.integer[Any]]], pa.Array]  # indices, ascending, -> their names


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
            names = self._namer(info)
            for first in range(0, info.size, ROWS_AT_ONCE):
                last = min(first + ROWS_AT_ONCE, info.size)
                indices = np.arange(first, last, dtype=np.int32)
                field, numbers = pa.repeat(info.name, len(indices)), pa.array(indices)
                columns = [field, numbers, names(indices), *self._numbers(info, first, last)]
                yield pa.RecordBatch.from_arrays(columns, schema=SCHEMA)

    def _numbers(self, info: FieldInfo, first: int, last: int) -> tuple[pa.Array, pa.Array]:
        """Return the hashes and the counts of some of a field's indices."""
        if (ranked := self.ranked.get(info.name)) is None:
            return pa.nulls(last - first, pa.int64()), pa.array(self.counts[info.name][first:last])
        few = max(0, min(FIRST, last) - first)  # of the indices without a value
        own = slice(max(first, FIRST) - FIRST, max(last, FIRST) - FIRST)
        special = np.array([ranked.missing, ranked.other])[first : first + few]
        hashes = pa.concat_arrays([pa.nulls(few, pa.int64()), pa.array(ranked.hashes[own])])
        return hashes, pa.array(np.concatenate([special, ranked.counts[own]]))

    def _namer(self, info: FieldInfo) -> Namer:
        """Return what names indices of a field."""
        if info.hashed is not None:
            return _slot_names
        if info.kind == "crossed":
            return self._cross_namer(info)
        if info.kind == "continuous":
            names = _texts([MISSING_LEVEL, VALUE_LEVEL])
        elif info.kind == "bucketed":
            names = _texts(_bucket_names(info))
        else:
            special = _texts([MISSING_LEVEL, OTHER_LEVEL])
            names = pa.concat_arrays([special, self.ranked[info.name].values])
        return lambda indices: names.take(pa.array(indices))

    def _cross_namer(self, info: FieldInfo) -> Namer:
        """Return what names a cross by its parents' levels, such as 'JFK × LAX'."""
        parents = [self.field_map[name] for name in info.of]
        namers = [self._namer(parent) for parent in parents]
        keys = self.ranked[info.name].hashes

        def names(indices: NDArray[np.integer[Any]]) -> pa.Array:
            special = [(MISSING_LEVEL, OTHER_LEVEL)[i] for i in indices[:FIRST] if i < FIRST]
            rest = keys[indices[len(special) :] - FIRST]
            parts: list[pa.Array] = []
            for parent, namer in zip(reversed(parents), reversed(namers), strict=True):
                rest, at = np.divmod(rest, parent.size)
                parts.insert(0, namer(at))
            return pa.concat_arrays([_texts(special), _joined(*parts, by=" × ")])

        return names


def _slot_names(indices: NDArray[np.integer[Any]]) -> pa.Array:
    """Return the names of a hashed field's indices."""
    numbers = pa.array(indices).cast(pa.large_string())
    names = _joined(pa.scalar("#", pa.large_string()), numbers, by="")
    return pc.if_else(pa.array(indices == 0), pa.scalar(MISSING_LEVEL, pa.large_string()), names)


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
        _write_file(levels, path)
        return tables.write(spark.read.parquet(files.uri(path)), config, "vocabulary")
    finally:
        path.unlink(missing_ok=True)


def _write_file(levels: Levels, path: AnyPath) -> None:
    try:
        with path.open("wb") as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
            for batch in levels.batches():
                writer.write_batch(batch)
    except OSError as error:
        said = error.strerror or str(error)  # an object store's errors have no number
        raise OSError(error.errno, f"{said}, while writing {path} .") from error
