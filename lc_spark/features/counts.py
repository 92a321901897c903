"""Counts of values: added up in each task, and sent on as bundles.

A bundle is an Arrow table in bytes, of values whose hashes fall into one bucket. So Spark moves a
few large rows: a row for each value took it four times as long.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame

from lc_spark.hashing import hash_texts, mix

# What a task holds, in values and in their bytes: up to 1 GB when it sends them on.
HELD_COUNTS, HELD_BYTES = 8_000_000, 2**28
BUCKETS = 64  # at least
BUCKET_CELLS = 2**23  # Spark hands on 1 GB at once: 128 bytes a cell, were all of them to differ
BUNDLES = "bucket int, bundle binary"
Batches = Iterable[pa.RecordBatch]


def buckets_for(cells: int) -> int:
    """Return how many buckets the values of so many cells, rows times fields, are to have."""
    return max(BUCKETS, -(-cells // BUCKET_CELLS))


class Counts:
    """Counts by field of what one task has met, be it texts or keys."""

    def __init__(self, column: str, buckets: int) -> None:
        """Take the name that bundles give to the counts, and the number of buckets."""
        self.column, self.buckets = column, buckets
        self.parts: dict[str, list[pa.Table]] = {}
        self.size, self.bytes = 0, 0  # of values held, those that are in several parts as often

    def add(self, name: str, values: pa.Array, counts: pa.Array) -> None:
        """Add counts [n] of texts or int64 keys [n]; null stands for missing."""
        if not pa.types.is_integer(values.type):
            values = values.cast(pa.string())  # Spark may have made it large_string
        part = pa.table([values, counts], ["value", "count"])
        self.parts.setdefault(name, []).append(part)
        self.size += part.num_rows
        self.bytes += part.nbytes

    def relieve(self) -> Iterator[pa.RecordBatch]:
        """Add up what is held, if that is much, and yield it where most of it differs."""
        if self._holds(1.0):
            self.parts = {name: [_added_up(parts)] for name, parts in self.parts.items()}
            held = [part for [part] in self.parts.values()]
            self.size = sum(part.num_rows for part in held)
            self.bytes = sum(part.nbytes for part in held)
            if self._holds(0.5):
                yield from self.give()

    def _holds(self, share: float) -> bool:
        return self.size > share * HELD_COUNTS or self.bytes > share * HELD_BYTES

    def give(self) -> Iterator[pa.RecordBatch]:
        """Yield all counts as bundles of (field, hash, counts, and value where it is a text)."""
        tables = []
        for name, parts in self.parts.items():
            values, counts = (c.combine_chunks() for c in pa.concat_tables(parts).columns)
            columns = {"field": pa.repeat(name, len(values)), self.column: counts}
            if pa.types.is_integer(values.type):
                columns["hash"] = values
            else:
                columns |= {"hash": hash_texts(values), "value": values}
            columns["field"] = pc.dictionary_encode(columns["field"])
            tables.append(pa.table(columns))
        self.parts, self.size, self.bytes = {}, 0, 0
        if tables:
            yield from _bundles(pa.concat_tables(tables), self.buckets)


def bundled(df: DataFrame, buckets: int) -> DataFrame:
    """Return rows of (field string, hash long, ...) as bundles of so many buckets."""

    def passed_on(batches: Batches) -> Batches:
        for batch in batches:
            # Spark may have made texts large_string.
            kinds = {"field": pa.string(), "value": pa.string()}
            schema = pa.schema([f.with_type(kinds.get(f.name, f.type)) for f in batch.schema])
            table = pa.Table.from_batches([batch]).cast(schema)
            at, field = table.column_names.index("field"), pc.dictionary_encode(table["field"])
            yield from _bundles(table.set_column(at, "field", field), buckets)

    return df.mapInArrow(passed_on, BUNDLES)


def unbundled(bundles: Iterable[bytes]) -> pa.Table:
    """Return the rows of bundles; a column that some of them lack is null there."""
    tables = [pa.ipc.open_stream(pa.py_buffer(bundle)).read_all() for bundle in bundles]
    return pa.concat_tables(tables, promote_options="default").unify_dictionaries()


def to_bytes(table: pa.Table) -> bytes:
    """Return a table as a bundle."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _bundles(table: pa.Table, n_buckets: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a table bucket by bucket, as rows of BUNDLES; what is missing is in 0."""
    # Keys are made of sizes: unmixed, those of a cross may all leave one remainder.
    hashes = mix(pc.fill_null(table["hash"], 0).to_numpy())
    buckets = hashes.view(np.uint64) % np.uint64(n_buckets)
    buckets = buckets.astype(np.min_scalar_type(n_buckets))  # of 16 bits: a radix sort
    order = np.argsort(buckets, kind="stable")
    ordered = table.unify_dictionaries().combine_chunks().take(pa.array(order))
    at, field = ordered.column_names.index("field"), ordered["field"].combine_chunks()
    ends = np.cumsum(np.bincount(buckets)).tolist()
    for bucket, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        if first < last:
            part = ordered.slice(first, last - first)
            if len(part) < len(field.dictionary):  # names of its own fields alone: they take less
                own = pc.dictionary_encode(part["field"].cast(pa.string()))
                part = part.set_column(at, "field", own)
            content = to_bytes(part)
            columns = [pa.array([bucket], pa.int32()), pa.array([content], pa.binary())]
            yield pa.RecordBatch.from_arrays(columns, names=["bucket", "bundle"])


def _added_up(parts: Sequence[pa.Table]) -> pa.Table:
    summed = pa.concat_tables(parts).group_by("value").aggregate([("count", "sum")])
    return pa.table([summed["value"], summed["count_sum"]], ["value", "count"])
