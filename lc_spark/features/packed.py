"""Encodes rows into one binary column, and writes the rows of a partition as a part file.

Spark handles a row value by value, so that moving 158 encoded columns through its shuffle and its
Parquet writer took longer than to encode them. One value of 158 x 4 bytes costs it next to nothing.
"""

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyspark.sql import DataFrame

from lc_spark.encoder import Vocabulary, encode
from lc_spark.features.direct import Preparer, narrow_df, pieces
from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.files import as_path

Batches = Iterable[pa.RecordBatch]
PACKED = "__packed"
# Column of a part file -> what it is called on its way; and what sorts and places a row.
WRITTEN = {"row_id": "row_id", "label": "label", "fold": "fold", "date": "__days"}
KEPT = (*WRITTEN.values(), "split", "__key", "__part")
ROWS_AT_ONCE = 2048  # packed together: what is written across rows then stays in the cache


def packed_df(
    raw_df: DataFrame, field_map: FieldMap, vocabulary: Vocabulary, keep: Sequence[str]
) -> DataFrame:
    """Return the columns to keep and the encoded row as PACKED, rows in the same partitions."""
    kept_schema = raw_df.select(*keep).schema
    kept = [f"`{c.name}` {c.dataType.simpleString()}" for c in kept_schema.fields]
    shared = raw_df.sparkSession.sparkContext.broadcast((field_map, vocabulary))
    passed_df, directly = narrow_df(raw_df, field_map, keep)

    def encode_batches(batches: Batches) -> Iterator[pa.RecordBatch]:
        fields, words = shared.value
        preparer = Preparer(directly)
        for piece in pieces(batches, directly):
            batch = piece.batch
            columns = {name: batch.column(name) for name in batch.schema.names}
            packed = pack(encode(columns | preparer.prepare(piece), fields, words), fields)
            arrays = [*(columns[name] for name in keep), packed]
            yield pa.RecordBatch.from_arrays(arrays, names=[*keep, PACKED])

    schema = ", ".join([*kept, f"{PACKED} binary"])
    return passed_df.mapInArrow(encode_batches, schema)


def pack(encoded: dict[str, NDArray[Any]], field_map: FieldMap) -> pa.Array:
    """Return encoded rows (see encoder.encode) as binary values of 4 bytes a column, in order."""
    columns: list[NDArray[np.int32]] = []
    for info in field_map.fields:
        values = encoded[info.name].view(np.int32)
        columns += [values] if values.ndim == 1 else list(values.T)
    n, width = len(columns[0]), len(columns)
    rows = np.empty((n, width), np.int32)
    for at in range(0, n, ROWS_AT_ONCE):
        part = slice(at, at + ROWS_AT_ONCE)
        rows[part] = np.stack([column[part] for column in columns], axis=1)
    offsets = np.arange(n + 1, dtype=np.int32) * (width * 4)
    return pa.Array.from_buffers(pa.binary(), n, [None, pa.py_buffer(offsets), pa.py_buffer(rows)])


def unpack(packed: pa.Array, field_map: FieldMap, order: NDArray[np.int64]) -> list[pa.Array]:
    """Return the columns of packed rows, taken in an order, as shards hold them."""
    width = sum(info.max_values for info in field_map.fields)
    _, offsets, content = packed.buffers()
    first = np.frombuffer(offsets, np.int32)[packed.offset]
    rows = np.frombuffer(content, np.int32, len(packed) * width, first).reshape(-1, width)
    columns = np.empty((width, len(order)), np.int32)
    for at in range(0, len(order), ROWS_AT_ONCE):
        part = slice(at, at + ROWS_AT_ONCE)
        columns[:, part] = rows[order[part]].T
    arrays, at = [], 0
    for info in field_map.fields:
        arrays.append(_column(info, columns[at : at + info.max_values]))
        at += info.max_values
    return arrays


def _column(info: FieldInfo, columns: NDArray[np.int32]) -> pa.Array:
    if info.kind == "continuous":
        return pa.array(columns[0].view(np.float32))
    if info.kind != "multivalued":
        return pa.array(columns[0])
    n = columns.shape[1]
    offsets = np.arange(n + 1, dtype=np.int32) * info.max_values
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(columns.T.ravel()))


def part_writer(folder: str, field_map: FieldMap) -> Callable[[Batches], Batches]:
    """Return what mapInArrow calls on a partition that holds one part, with KEPT and PACKED.

    It writes the rows, in the order of __key and row_id, to folder/split=.../part-<__part>.parquet
    as one row group, and returns (rows long). The file has its name from its part, so that a task
    which is run again writes the same file again.
    """

    def write(batches: Batches) -> Iterator[pa.RecordBatch]:
        received = [batch for batch in batches if batch.num_rows]
        if not received:
            return
        table = pa.Table.from_batches(received)
        order = np.lexsort((table["row_id"].to_numpy(), table["__key"].to_numpy()))
        columns = {n: table[c].combine_chunks().take(pa.array(order)) for n, c in WRITTEN.items()}
        fields = unpack(table[PACKED].combine_chunks(), field_map, order)
        columns |= zip((info.name for info in field_map.fields), fields, strict=True)
        split, part = table["split"][0].as_py(), table["__part"][0].as_py()
        path = as_path(folder) / f"split={split}" / f"part-{part:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Under another name first: a worker may outlive its executor while the task runs again.
        own = path.with_name(f".{path.name}.{uuid.uuid4().hex}") if isinstance(path, Path) else path
        try:
            with own.open("wb") as file:
                pq.write_table(pa.table(columns), file, len(order), compression="zstd")
        except OSError as error:
            if isinstance(own, Path):
                own.unlink(missing_ok=True)
            said = error.strerror or str(error)  # an object store's errors have no number
            raise OSError(error.errno, f"{said}, while writing {path} .") from error
        if isinstance(own, Path):
            os.replace(own, str(path))
        yield pa.RecordBatch.from_pydict({"rows": [len(order)]})

    return write
