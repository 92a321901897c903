"""Ranks counted values into vocabularies: Spark adds the counts up, the driver orders what is kept.

Spark adds up by 64-bit hash, columns of fixed width alone: a text among them makes it sort all
rows. A second hash reveals a collision. The text of a value comes to the driver only if it is kept.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from lc_spark.encoder import Vocabulary
from lc_spark.errors import LcSparkError
from lc_spark.features.memory import refuse_too_many
from lc_spark.field_map import OUT_OF_VOCABULARY

FIRST = OUT_OF_VOCABULARY + 1  # index of the first value
Batches = Iterable[pa.RecordBatch]


@dataclass(frozen=True)
class Given:
    """Indices that values have from an earlier fit, and which values are too old to get one."""

    known_df: DataFrame | None = None  # (field, index, value, hash): their indices stay
    seen_df: DataFrame | None = None  # (field, hash) of values seen of late: others are left out


FRESH = Given()


@dataclass(frozen=True)
class Ranked:
    """The values of a field in the order of their indices, from 2 on, and the rows without one."""

    hashes: NDArray[np.int64]  # of a cross its keys
    counts: NDArray[np.int64]
    values: pa.Array | None  # texts; None for a cross
    missing: int  # rows of index 0
    other: int  # rows of index 1: of values that were cut


@dataclass(frozen=True)
class _Totals:
    """Sums by field, and one row a value that is kept: its field's code, and what it counts."""

    sums: Mapping[str, Any]  # (missing, rows, kept, kept_rows, bytes, collided)
    codes: Mapping[str, int]
    kept: pa.Table  # (code, hash, count, known, part), by code and hash


def rank_values(
    counts_df: DataFrame,
    min_counts: Mapping[str, int],
    given: Given = FRESH,
    free: int | None = None,
) -> dict[str, Ranked]:
    """Rank counted values (field, value, count): count descending, then value ascending.

    Values that are known keep their indices, new ones come after them. counts_df is read twice:
    cache it. Raises LcSparkError when two values of a field share a hash, and, before anything is
    collected, when the values need more than the `free` bytes of memory (by default: this
    machine's).
    """
    if not min_counts:
        return {}
    text = F.col("value")
    rows_df = counts_df.select(
        "field",
        "value",
        "count",
        F.when(text.isNotNull(), F.xxhash64(text)).alias("hash"),
        # The task with the least of these passes a value's text on: at random, or one had them all.
        F.pmod(F.hash(F.spark_partition_id(), text), F.lit(2**31 - 1)).alias("part"),
    )
    rows_df = _with_given(rows_df, given)
    # The seed goes first: chained after the value, it would hash a collision to a collision.
    second = F.when(text.isNotNull(), F.xxhash64(F.lit(1), text))
    totals_df = _added_up(
        rows_df.withColumns({"second": second, "length": F.octet_length(text)})
    ).persist(StorageLevel.DISK_ONLY)
    totals = _totals(totals_df, min_counts, 0, free)
    for name, sums in totals.sums.items():
        if sums["collided"] is not None:
            same = (F.col("field") == name) & (F.col("hash") == sums["collided"])
            pair = " and ".join(
                repr(row["value"]) for row in rows_df.where(same).select("value").distinct().take(2)
            )
            raise LcSparkError(
                f"Field '{name}': {pair} have the same 64-bit hash. Change one of them in the "
                "source (a prefix is enough)."
            )
    texts = _texts(rows_df.where(text.isNotNull()), totals)
    totals_df.unpersist()
    return {name: _ranked(totals, name, texts) for name in min_counts}


def rank_keys(
    key_counts_df: DataFrame,
    min_counts: Mapping[str, int],
    given: Given = FRESH,
    held: int = 0,
    free: int | None = None,
) -> dict[str, Ranked]:
    """Rank counted cross keys (field, key, count) as rank_values ranks values, equals by key.

    Key 0, all parents missing, is index 0. Raises LcSparkError when the keys do not fit beside the
    `held` values that there are already.
    """
    if not min_counts:
        return {}
    key = F.nullif("key", F.lit(0)).alias("hash")
    rows_df = key_counts_df.where(F.col("field").isin(list(min_counts))).select(
        "field", key, "count", F.lit(0).alias("part")
    )
    rows_df = _with_given(rows_df, given)
    rows_df = rows_df.withColumns({"second": F.lit(0).cast("long"), "length": F.lit(0)})
    totals_df = _added_up(rows_df).persist(StorageLevel.DISK_ONLY)
    totals = _totals(totals_df, min_counts, held, free)
    totals_df.unpersist()
    return {name: _ranked(totals, name, None) for name in min_counts}


def to_vocabulary(ranked: Mapping[str, Ranked]) -> Vocabulary:
    """Return the Vocabulary of ranked values."""
    entries = {}
    for name in sorted(ranked):
        if len(hashes := ranked[name].hashes):
            order = np.argsort(hashes, kind="stable")
            entries[name] = (hashes[order], (order + FIRST).astype(np.int32))
    return Vocabulary(entries)


def _with_given(rows_df: DataFrame, given: Given) -> DataFrame:
    """Add `known`, the index that a value has already, and `seen`, whether it may get one."""
    rows_df = rows_df.withColumns(
        {"known": F.lit(None).cast("int"), "seen": F.lit(given.seen_df is None)}
    )
    if given.known_df is not None:
        known = {"known": F.col("index"), "count": F.lit(0).cast("long"), "part": F.lit(-1)}
        known_df = given.known_df.withColumns(known)
        columns = [c for c in rows_df.columns if c in known_df.columns]
        rows_df = rows_df.unionByName(known_df.select(*columns), allowMissingColumns=True)
    if given.seen_df is not None:
        seen_df = given.seen_df.withColumn("seen", F.lit(True))
        rows_df = rows_df.unionByName(seen_df, allowMissingColumns=True)
    return rows_df


def _added_up(rows_df: DataFrame) -> DataFrame:
    """Return one row a field and hash; the hash null stands for missing."""
    return rows_df.groupBy("field", "hash").agg(
        F.coalesce(F.sum("count"), F.lit(0)).alias("count"),
        F.min("part").alias("part"),
        F.min("second").alias("least"),
        F.max("second").alias("most"),
        F.max("length").alias("length"),
        F.max("known").alias("known"),
        F.max("seen").alias("seen"),
    )


def _totals(
    totals_df: DataFrame, min_counts: Mapping[str, int], held: int, free: int | None
) -> _Totals:
    codes = {name: code for code, name in enumerate(sorted(min_counts))}
    spark = totals_df.sparkSession
    # A number in place of the name: a string a row would be more than all the rest.
    cuts = [(name, code, min_counts[name]) for name, code in codes.items()]
    cuts_df = spark.createDataFrame(cuts, "field string, code int, min_count long")
    often = (F.col("count") >= F.col("min_count")) & F.col("seen")
    keep = F.col("hash").isNotNull() & (F.col("known").isNotNull() | often)
    kept_df = totals_df.join(F.broadcast(cuts_df), "field").withColumn("keep", keep)
    collided = F.col("hash").isNotNull() & (F.col("least") != F.col("most"))
    found = kept_df.groupBy("field").agg(
        F.sum(F.when(F.col("hash").isNull(), F.col("count")).otherwise(0)).alias("missing"),
        F.sum("count").alias("rows"),
        F.count_if("keep").alias("kept"),
        F.sum(F.when(F.col("keep"), F.col("count")).otherwise(0)).alias("kept_rows"),
        F.sum(F.when(F.col("keep"), F.col("length")).otherwise(0)).alias("bytes"),
        F.min(F.when(collided, F.col("hash"))).alias("collided"),
    )
    sums = {row["field"]: row for row in found.collect()}
    counted = {name: row["kept"] for name, row in sums.items() if row["kept"]}
    texts = sum(row["bytes"] or 0 for row in sums.values())
    kept_df = kept_df.where("keep")
    refuse_too_many(kept_df.select("field", "count"), counted, texts, held, free)
    kept = kept_df.select("code", "hash", "count", "known", "part").toArrow()
    order = np.lexsort((kept["hash"].to_numpy(), kept["code"].to_numpy()))
    return _Totals(sums, codes, kept.take(pa.array(order)))


def _texts(rows_df: DataFrame, totals: _Totals) -> pa.Array:
    """Return the texts of the kept values, in their order."""
    kept, wanted = totals.kept, {}
    codes, hashes, parts = (kept[c].to_numpy() for c in ("code", "hash", "part"))
    ends = np.searchsorted(codes, np.arange(len(totals.codes) + 1))
    for name, code in totals.codes.items():
        own = slice(ends[code], ends[code + 1])
        wanted[name] = (int(ends[code]), hashes[own], parts[own])
    context = rows_df.sparkSession.sparkContext
    shared = context.broadcast(wanted)

    def passed_on(batches: Batches) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            names = pc.dictionary_encode(batch.column("field"))
            of = names.indices.to_numpy()
            found, part = batch.column("hash").to_numpy(), batch.column("part").to_numpy()
            for code, name in enumerate(names.dictionary.to_pylist()):
                first, known, by = shared.value[name]
                rows = np.flatnonzero(of == code)
                at = np.searchsorted(known, found[rows])
                at[at == len(known)] = 0
                here = (known[at] == found[rows]) & (by[at] == part[rows]) if len(known) else at > 0
                values = batch.column("value").take(pa.array(rows[here]))
                places = pa.array(first + at[here].astype(np.int64))
                yield pa.RecordBatch.from_arrays([places, values], ["place", "value"])

    columns = rows_df.select("field", "hash", "part", "value")
    table = columns.mapInArrow(passed_on, "place long, value string").toArrow()
    shared.destroy()
    rows = np.full(len(codes), -1)
    rows[table["place"].to_numpy()] = np.arange(table.num_rows)
    assert (rows >= 0).all(), "a kept value was counted, so that it has a text"
    # 64-bit offsets: all texts together may pass 2 GB.
    return table["value"].cast(pa.large_string()).combine_chunks().take(pa.array(rows))


def _ranked(totals: _Totals, name: str, texts: pa.Array | None) -> Ranked:
    """Order the kept values of a field."""
    codes = totals.kept["code"].to_numpy()
    first, last = np.searchsorted(codes, [totals.codes[name], totals.codes[name] + 1])
    kept = totals.kept.slice(first, last - first)
    hashes, counts = kept["hash"].to_numpy(), kept["count"].to_numpy()
    known = kept["known"].combine_chunks()
    new = np.flatnonzero(known.is_null().to_numpy(zero_copy_only=False))
    values = None if texts is None else texts.slice(first, last - first)
    if values is None:
        new = new[np.lexsort((hashes[new], -counts[new]))]
    else:
        columns = pa.table({"count": counts[new], "value": values.take(pa.array(new))})
        by = [("count", "descending"), ("value", "ascending")]
        new = new[pc.sort_indices(columns, sort_keys=by).to_numpy()]
    old = np.empty(len(hashes) - len(new), np.int64)
    had = np.flatnonzero(known.is_valid().to_numpy(zero_copy_only=False))
    old[known.drop_null().to_numpy() - FIRST] = had
    order = np.concatenate([old, new])
    sums = totals.sums.get(name)
    missing, rows, kept_rows = (
        (sums["missing"], sums["rows"], sums["kept_rows"]) if sums else (0, 0, 0)
    )
    return Ranked(
        hashes[order],
        counts[order],
        None if values is None else values.take(pa.array(order)),
        missing,
        rows - missing - kept_rows,
    )
