"""Adds the counts of all tasks up, bucket by bucket, and brings what is kept to the driver."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyspark import StorageLevel
from pyspark.sql import DataFrame

from lc_spark.errors import LcSparkError
from lc_spark.features.counts import to_bytes, unbundled

MIN_COUNTS = (3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
SUMMED = 5  # numbers of Sums before those of MIN_COUNTS


@dataclass(frozen=True)
class Sums:
    """What there is of a field, before anything is collected."""

    missing: int  # rows
    rows: int
    kept: int  # values
    kept_rows: int
    bytes: int  # of the texts of kept values
    often: tuple[int, ...]  # kept values in as many rows as each of MIN_COUNTS


def add_up(bundles_df: DataFrame, min_counts: Mapping[str, int], recent: bool) -> DataFrame:
    """Return the sums and the values to be kept of each bucket, to be read twice; unpersist it.

    Bundles have (field, hash), and each some of count, known (an index that the value has already),
    seen (how often it occurs of late) and value. Kept is what is known, and what occurs min_count
    times and, where `recent` is asked for, of late. Fields without a min_count are passed over.
    """
    names = list(min_counts)
    cuts = np.array(list(min_counts.values()))

    def merge(bundles: pa.Table) -> pa.Table:
        return _merged(unbundled(b.as_buffer() for b in bundles["bundle"]), names, cuts, recent)

    schema = "sums binary, kept binary, field string, pair array<string>"
    return bundles_df.groupBy("bucket").applyInArrow(merge, schema).persist(StorageLevel.DISK_ONLY)


def read_sums(added_df: DataFrame, min_counts: Mapping[str, int]) -> dict[str, Sums]:
    """Return the sums by field; raises LcSparkError where two values share a hash."""
    width = SUMMED + len(MIN_COUNTS)
    nothing = np.zeros(len(min_counts) * width, np.int64)

    def of_task(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            total = sum((np.frombuffer(s.as_buffer(), np.int64) for s in batch["sums"]), nothing)
            yield pa.RecordBatch.from_pydict({"sums": pa.array([total.tobytes()], pa.binary())})

    # Buckets may be many thousands: their sums come to the driver added up by tasks. First of all,
    # since it makes all buckets at once, and first() one partition after the other.
    parts = added_df.select("sums").mapInArrow(of_task, "sums binary").collect()
    collided = added_df.where("pair IS NOT NULL").select("field", "pair").first()
    if collided is not None:
        pair = " and ".join(map(repr, collided["pair"]))
        raise LcSparkError(
            f"Field '{collided['field']}': {pair} have the same 64-bit hash. Change one of them in "
            "the source (a prefix is enough)."
        )
    total = sum((np.frombuffer(part["sums"], np.int64) for part in parts), nothing)
    sums = {}
    for name, line in zip(min_counts, total.reshape(-1, width).tolist(), strict=True):
        missing, rows, kept, kept_rows, size, *often = line
        sums[name] = Sums(missing, rows, kept, kept_rows, size, tuple(often))
    return sums


def read_kept(added_df: DataFrame) -> pa.Table:
    """Return (field, hash, count, known, and value where there are texts), in the order of fields.

    field is the place of its name in min_counts; known is -1 for a value without an index.
    """
    bundles = added_df.select("kept").toArrow()["kept"]
    kept = unbundled(bundle.as_buffer() for bundle in bundles)
    if "value" in kept.column_names:  # 64-bit offsets: all texts together may pass 2 GB
        texts = kept["value"].cast(pa.large_string())
        kept = kept.set_column(kept.column_names.index("value"), "value", texts)
    fields = kept["field"].to_numpy()
    small = np.min_scalar_type(fields.max(initial=0))  # of 16 bits: a radix sort
    order = np.argsort(fields.astype(small), kind="stable")
    return kept.combine_chunks().take(pa.array(order))


def _merged(rows: pa.Table, names: list[str], cuts: NDArray[np.int64], recent: bool) -> pa.Table:
    """Return the sums of a bucket's rows and what is kept of them, as one row."""
    fields, hashes = _places(rows["field"].combine_chunks(), names), _numbers(rows, "hash", 0)
    counts, is_value = _numbers(rows, "count", 0), pc.is_valid(rows["hash"]).to_numpy()
    absent = np.flatnonzero((fields >= 0) & ~is_value)
    order = np.flatnonzero((fields >= 0) & is_value)
    order = order[np.lexsort((hashes[order], fields[order]))]
    new = np.ones(len(order), bool)  # whether a row has another value than the one before it
    new[1:] = np.diff(fields[order]) != 0
    new[1:] |= np.diff(hashes[order]) != 0
    starts = np.flatnonzero(new)
    values = {
        "field": fields[order[starts]],
        "hash": hashes[order[starts]],
        "count": np.add.reduceat(counts[order], starts),
        "known": np.maximum.reduceat(_numbers(rows, "known", -1)[order], starts),
    }
    keep = values["count"] >= cuts[values["field"]]
    if recent:
        keep &= np.add.reduceat(_numbers(rows, "seen", 0)[order], starts) > 0
    keep |= values["known"] >= 0
    kept = pa.table({name: column[keep] for name, column in values.items()})
    collided: tuple[str | None, list[str] | None] = None, None
    if "value" in rows.column_names:
        texts = rows["value"].combine_chunks().take(pa.array(order))
        collided = _collision(texts, new, names, fields[order])
        kept = kept.append_column("value", texts.take(pa.array(starts[keep])))
    missing = np.bincount(fields[absent], counts[absent], len(names))
    of_rows = missing + np.bincount(values["field"], values["count"], len(names))
    sums = np.stack([missing, of_rows, *_of_kept(kept, len(names))], axis=1).astype(np.int64)
    return pa.table(
        {
            "sums": pa.array([sums.tobytes()], pa.binary()),
            "kept": pa.array([to_bytes(kept)], pa.binary()),
            "field": pa.array([collided[0]], pa.string()),
            "pair": pa.array([collided[1]], pa.list_(pa.string())),
        }
    )


def _of_kept(kept: pa.Table, n: int) -> list[NDArray[Any]]:
    """Return by field, of n: values, rows, bytes of texts, values as often as MIN_COUNTS."""
    fields, counts = kept["field"].to_numpy(), kept["count"].to_numpy()
    lengths = np.zeros(len(kept))
    if "value" in kept.column_names:
        lengths = pc.binary_length(kept["value"]).to_numpy()
    often = [np.bincount(fields[counts >= cut], minlength=n) for cut in MIN_COUNTS]
    sums = [np.bincount(fields, weights, n) for weights in (None, counts, lengths)]
    return [*sums, *often]


def _places(column: pa.DictionaryArray, names: list[str]) -> NDArray[np.int64]:
    """Return the place in names of each name of a column; -1 where it has none."""
    place_of = {name: place for place, name in enumerate(names)}
    places = [place_of.get(name, -1) for name in column.dictionary.to_pylist()]
    found: NDArray[np.int64] = np.array(places, np.int64)[column.indices.to_numpy()]
    return found


def _numbers(rows: pa.Table, column: str, absent: int) -> NDArray[np.int64]:
    """Return a column of whole numbers, all of them absent where there is no such column."""
    if column not in rows.column_names:
        return np.full(len(rows), absent, np.int64)
    numbers: NDArray[np.int64] = pc.fill_null(rows[column], absent).to_numpy()
    return numbers.astype(np.int64, copy=False)


def _collision(
    texts: pa.Array, new: NDArray[np.bool_], names: list[str], fields: NDArray[np.int64]
) -> tuple[str | None, list[str] | None]:
    """Return the field and the two texts of the first two that share a hash, if any do."""
    later = np.flatnonzero(~new)
    same = pc.equal(texts.take(pa.array(later)), texts.take(pa.array(later - 1)))
    other = later[~same.to_numpy(zero_copy_only=False)]
    if not len(other):
        return None, None
    pair = texts.take(pa.array([other[0] - 1, other[0]])).cast(pa.binary())
    return names[fields[other[0]]], [text.decode(errors="replace") for text in pair.to_pylist()]
