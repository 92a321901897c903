"""Reads the wide part of ``raw`` in Python tasks, from the Parquet files that hold it.

Spark says which rows there are and where each lies, and passes on what needs its functions. The
texts and numbers of most fields do not go through its rows, value by value: that took ten times as
long as reading them here, where a text is hashed once for each of its row groups.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from lc_spark.features.prepare import FLOATS, INTEGERS, prepared_column
from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.files import as_path
from lc_spark.hashing import hash_texts
from lc_spark.tables import FILE, ROW

Batches = Iterable[pa.RecordBatch]


def direct_fields(df: DataFrame, infos: Sequence[FieldInfo]) -> list[FieldInfo]:
    """Return the fields whose values can be read here: texts and numbers of rows with places.

    A column that is absent, or of another type than when the field was fitted, is for Spark.
    """
    types = dict(df.dtypes)
    if FILE not in types:
        return []
    found = [info for info in infos if types.get(info.column) == info.column_type]
    return [
        info
        for info in found
        if (info.kind == "categorical" and info.column_type == "string")
        or (info.kind in ("bucketed", "continuous") and info.column_type in (*INTEGERS, *FLOATS))
    ]


def narrow_df(
    df: DataFrame, field_map: FieldMap, keep: Sequence[str]
) -> tuple[DataFrame, list[FieldInfo]]:
    """Return what Spark passes on to be encoded, and the fields that ``Preparer`` reads instead.

    That is the columns to keep, the prepared ones of other fields, and where the direct ones are.
    """
    infos = [info for info in field_map.fields if info.kind != "crossed"]
    direct = direct_fields(df, infos)
    names = {info.name for info in direct}
    columns = [F.col(name) for name in keep]
    columns += [prepared_column(info) for info in infos if info.name not in names]
    columns += [F.col(FILE), F.col(ROW)] if direct else []
    return df.select(*columns), direct


class RowGroup(NamedTuple):
    """The wide columns of a row group, the texts as dictionaries."""

    path: str
    start: int
    columns: Mapping[str, pa.Array]


class Piece(NamedTuple):
    """Rows of a batch that lie in one row group, and where in it; None where nothing is direct."""

    batch: pa.RecordBatch
    group: RowGroup | None
    rows: NDArray[np.int64]


def pieces(batches: Batches, infos: Sequence[FieldInfo]) -> Iterator[Piece]:
    """Yield the rows of batches by row group; infos are the fields that are read here."""
    columns = sorted({info.column for info in infos})
    texts = sorted({info.column for info in infos if info.kind == "categorical"})
    group: RowGroup | None = None
    path = ""
    with ExitStack() as opened:
        for batch in batches:
            if not infos:
                yield Piece(batch, None, np.zeros(0, np.int64))
                continue
            at = batch.column(ROW).to_numpy()
            names = pc.dictionary_encode(batch.column(FILE))
            codes = names.indices.to_numpy()
            for begin, end in _runs(codes):
                if (found := str(names.dictionary[codes[begin]])) != path:
                    path = found
                    opened.close()
                    file = opened.enter_context(as_path(unquote(path)).open("rb"))
                    metadata = pq.read_metadata(file)
                    there = [text for text in texts if text in metadata.schema.names]
                    parquet = pq.ParquetFile(file, metadata=metadata, read_dictionary=there)
                    starts = _starts(metadata)
                numbers = np.searchsorted(starts, at[begin:end], side="right") - 1
                for first, last in _runs(numbers):
                    start = int(starts[numbers[first]])
                    if group is None or (group.path, group.start) != (path, start):
                        table = parquet.read_row_group(int(numbers[first]), columns)
                        wide = {c: _whole(table, c, c in texts) for c in columns}
                        group = RowGroup(path, start, wide)
                    rows = at[begin + first : begin + last] - start
                    yield Piece(batch.slice(begin + first, last - first), group, rows)


def _runs(values: NDArray[np.generic]) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of each stretch of equal values."""
    if len(values):
        edges = np.flatnonzero(values[1:] != values[:-1]) + 1
        yield from zip([0, *edges.tolist()], [*edges.tolist(), len(values)], strict=True)


def _starts(metadata: pq.FileMetaData) -> NDArray[np.int64]:
    """Return the number of the first row of each row group."""
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return np.cumsum([0, *rows[:-1]], dtype=np.int64)


def _whole(table: pa.Table, column: str, is_text: bool) -> pa.Array:
    if column not in table.column_names:  # a file of a day before there was the column
        kind = pa.dictionary(pa.int32(), pa.string()) if is_text else pa.float64()
        return pa.nulls(table.num_rows, kind)
    return table[column].unify_dictionaries().combine_chunks()


def taken(column: pa.Array, rows: NDArray[np.int64]) -> pa.Array:
    """Return some rows of a column, without a copy where they follow each other."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all()):
        return column.slice(int(rows[0]), len(rows))
    return column.take(pa.array(rows))


def numbers(column: pa.Array) -> pa.Array:
    """Return a column of numbers as float64."""
    return column.cast(pa.float64(), safe=False)  # as Spark casts a long that a double cannot hold


class Preparer:
    """Turns pieces into what ``encoder.encode`` wants of the direct fields."""

    def __init__(self, infos: Sequence[FieldInfo]) -> None:
        """Take the fields that are read here."""
        self.infos = infos
        self.group: RowGroup | None = None
        self.hashes: dict[str, pa.Array] = {}

    def prepare(self, piece: Piece) -> dict[str, pa.Array]:
        """Return int64 hashes, as dictionaries, or float64 numbers; null where missing."""
        if piece.group is None:
            return {}
        if piece.group is not self.group:
            self.group, self.hashes = piece.group, {}
        prepared = {}
        for info in self.infos:
            column = piece.group.columns[info.column]
            if info.kind != "categorical":
                prepared[info.name] = numbers(taken(column, piece.rows))
                continue
            if info.column not in self.hashes:
                self.hashes[info.column] = hash_texts(column.dictionary)
            codes = taken(column, piece.rows).indices
            hashes = self.hashes[info.column]
            prepared[info.name] = pa.DictionaryArray.from_arrays(codes, hashes)
        return prepared


class Tally:
    """Counts the texts of the direct fields, a row group after the other."""

    def __init__(self, infos: Sequence[FieldInfo]) -> None:
        """Take categorical fields that are read here."""
        self.infos = infos
        self.group: RowGroup | None = None
        self.counts: dict[str, NDArray[np.int64]] = {}

    def add(self, piece: Piece) -> Iterator[tuple[str, pa.Array, pa.Array]]:
        """Count a piece; yield (field, texts, counts) of the row group before, if it was its last.

        The text null stands for missing.
        """
        if piece.group is None:
            return
        if piece.group is not self.group:
            yield from self.give()
            self.group = piece.group
        for info in self.infos:
            column = piece.group.columns[info.column]
            codes = taken(column, piece.rows).indices.fill_null(len(column.dictionary)).to_numpy()
            counts = np.bincount(codes, minlength=len(column.dictionary) + 1)
            self.counts[info.name] = self.counts.get(info.name, 0) + counts

    def give(self) -> Iterator[tuple[str, pa.Array, pa.Array]]:
        """Yield the counts of the present row group, and hold none."""
        if self.group is None:
            return
        for info in self.infos:
            counts = self.counts[info.name]
            texts = self.group.columns[info.column].dictionary
            texts = pc.if_else(pc.equal(texts, ""), None, texts)
            texts = pa.concat_arrays([texts, pa.nulls(1, texts.type)])
            met = pa.array(np.flatnonzero(counts))
            yield info.name, texts.take(met), pa.array(counts).take(met)
        self.group, self.counts = None, {}
