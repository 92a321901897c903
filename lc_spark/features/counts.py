"""Counts of values: added up in each task, and sent on as bundles.

A bundle is an Arrow table in bytes, of values whose hashes fall into one bucket. So Spark moves a
few large rows: a row for each value took it four times as long.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame

from lc_spark.hashing import hash_texts

HELD_COUNTS = 8_000_000  # values that a task holds: some 0.5 GB when it sends them on
BUCKETS = 64  # at least
BUCKET_CELLS = 2**24  # an Arrow table holds 2 GB of texts: 128 bytes a cell, were all to differ
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
        self.size = 0  # values held, those that are in several parts as often

    def add(self, name: str, values: pa.Array, counts: pa.Array) -> None:
        """Add counts [n] of texts or int64 keys [n]; null stands for missing."""
        part = pa.table([values, counts], ["value", "count"])
        self.parts.setdefault(name, []).append(part)
        self.size += part.num_rows

    def relieve(self) -> Iterator[pa.RecordBatch]:
        """Add up what is held, if that is much, and yield it where most of it differs."""
        if self.size > HELD_COUNTS:
            self.parts = {name: [_added_up(parts)] for name, parts in self.parts.items()}
            self.size = sum(part.num_rows for [part] in self.parts.values())
            if self.size > HELD_COUNTS // 2:
                yield from self.give()

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
        self.parts, self.size = {}, 0
        if tables:
            yield from _bundles(pa.concat_tables(tables), self.buckets)


def bundled(df: DataFrame, buckets: int) -> DataFrame:
    """Return rows of (field string, hash long, ...) as bundles of so many buckets."""

    def passed_on(batches: Batches) -> Batches:
        for batch in batches:
            table = pa.Table.from_batches([batch])
            field = pc.dictionary_encode(table["field"])
            table = table.set_column(table.column_names.index("field"), "field", field)
            yield from _bundles(table, buckets)

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
    hashes = pc.fill_null(table["hash"], 0).to_numpy()
    buckets = hashes.view(np.uint64) % np.uint64(n_buckets)
    buckets = buckets.astype(np.min_scalar_type(n_buckets))  # of 16 bits: a radix sort
    order = np.argsort(buckets, kind="stable")
    ordered = table.unify_dictionaries().combine_chunks().take(pa.array(order))
    ends = np.cumsum(np.bincount(buckets)).tolist()
    for bucket, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        if first < last:
            content = to_bytes(ordered.slice(first, last - first))
            columns = [pa.array([bucket], pa.int32()), pa.array([content], pa.binary())]
            yield pa.RecordBatch.from_arrays(columns, names=["bucket", "bundle"])


def _added_up(parts: Sequence[pa.Table]) -> pa.Table:
    summed = pa.concat_tables(parts).group_by("value").aggregate([("count", "sum")])
    return pa.table([summed["value"], summed["count_sum"]], ["value", "count"])
