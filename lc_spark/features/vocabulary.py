"""Counts the values of fields on the train rows and ranks them into vocabularies.

Counting is by 64-bit hash with fixed-width aggregates; a second hash reveals a collision.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from lc_spark.encoder import Vocabulary, cross_keys, encode
from lc_spark.errors import LcSparkError
from lc_spark.features.counts import Counts
from lc_spark.features.direct import Tally, is_direct, pieces
from lc_spark.features.memory import refuse_too_many
from lc_spark.features.prepare import prepared_column, texts_column
from lc_spark.field_map import OUT_OF_VOCABULARY, FieldInfo, FieldMap
from lc_spark.tables import FILE, ROW

CHUNK_CELLS = 20_000_000  # values counted at once in a Python worker: a few hundred MB
HELD_COUNTS = 10_000_000  # distinct values that a worker adds up before it passes them on
Batches = Iterable[pa.RecordBatch]


def count_values(train_df: DataFrame, infos: Sequence[FieldInfo]) -> DataFrame:
    """Count the values of categorical and multivalued fields.

    Returns (field string, value string, count long), a distinct value once for each task, or more
    often where a task meets very many of them; null stands for missing.
    """
    directly = [info for info in infos if is_direct(train_df, info)]
    others = [info for info in infos if not is_direct(train_df, info)]
    # min_count counts rows: a value twice in one row is still one row.
    columns = [
        (texts_column(i) if i.kind == "categorical" else F.array_distinct(texts_column(i))).alias(
            i.name
        )
        for i in others
    ]
    columns += [F.col(FILE), F.col(ROW)] if directly else []

    def counted(batches: Batches) -> Batches:
        held, tally = Counts(), Tally(directly)
        for piece in pieces(batches, directly):
            for info in others:
                values = piece.batch.column(info.name)
                if pa.types.is_list(values.type):
                    values = _flat_or_missing(values)
                counts = pc.value_counts(values)
                held.add(info.name, counts.field("values"), counts.field("counts"))
            for found in tally.add(piece):
                held.add(*found)
            if held.size > HELD_COUNTS:
                yield from held.give()
        for found in tally.give():
            held.add(*found)
        yield from held.give()

    # Few tasks: the more rows one counts, the fewer values are passed on by several.
    n_tasks = 2 * train_df.sparkSession.sparkContext.defaultParallelism
    return (
        train_df.select(*columns)
        .coalesce(n_tasks)
        .mapInArrow(counted, "field string, value string, count long")
    )


def _flat_or_missing(lists: pa.Array) -> pa.Array:
    """Flatten lists; an empty or missing list counts as one missing value."""
    filled = pc.sum(pc.greater(pc.list_value_length(lists), 0)).as_py() or 0  # None if all are null
    n_missing = len(lists) - filled
    missing = pa.nulls(n_missing, lists.type.value_type)
    return pa.concat_arrays([pc.list_flatten(lists), missing])


def _chunks(batches: Batches, width: int) -> Iterator[pa.Table]:
    """Put small batches together: the larger a chunk, the fewer rows leave it."""
    held: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        held.append(batch)
        rows += batch.num_rows
        if rows * width >= CHUNK_CELLS:
            yield pa.Table.from_batches(held)
            held, rows = [], 0
    if held:
        yield pa.Table.from_batches(held)


def _counts_batch(name: str, counts: pa.StructArray) -> pa.RecordBatch:
    columns = [pa.repeat(name, len(counts)), counts.field("values"), counts.field("counts")]
    return pa.RecordBatch.from_arrays(columns, names=["field", "value", "count"])


@dataclass(frozen=True)
class Given:
    """Indices that values have from an earlier fit, and which values are too old to get one."""

    known_df: DataFrame | None = None  # (field, index, value, hash): their indices stay
    sizes: Mapping[str, int] = field(default_factory=dict)  # by field: new indices begin there
    seen_df: DataFrame | None = None  # (field, hash) of values seen of late: others are left out


FRESH = Given()


def rank_values(
    counts_df: DataFrame, min_counts: Mapping[str, int], given: Given = FRESH
) -> DataFrame:
    """Rank counted values: index 0 missing, 1 rare, then count descending, value ascending.

    Values that are known keep their indices, new ones come after them. Returns (field, index int,
    value, hash long, count long) with a null value and hash for indices 0 and 1. Raises
    LcSparkError when two values of a field share a hash.
    """
    if given.known_df is not None:
        known_df = given.known_df.select("field", "value", F.lit(0).cast("long").alias("count"))
        counts_df = counts_df.unionByName(known_df)
    # The seed goes first: chained after the value, it would hash a collision to a collision.
    hashed_df = counts_df.select(
        "field",
        "count",
        F.when(F.col("value").isNotNull(), F.xxhash64("value")).alias("hash"),
        F.xxhash64(F.lit(1), F.col("value")).alias("second"),
    )
    totals_df = hashed_df.groupBy("field", "hash").agg(
        F.sum("count").alias("count"),
        F.min("second").alias("least"),
        F.max("second").alias("most"),
    )
    totals_df = totals_df.persist(StorageLevel.DISK_ONLY)  # read three times
    values_df = counts_df.where(F.col("value").isNotNull()).select(
        "field", "value", F.xxhash64("value").alias("hash")
    )
    collided = totals_df.where(F.col("hash").isNotNull() & (F.col("least") != F.col("most")))
    found = collided.agg(F.min(F.struct("field", "hash")).alias("first")).first()
    if found is not None and found["first"] is not None:
        name, hashed = found["first"]
        same = (F.col("field") == name) & (F.col("hash") == hashed)
        pair = " and ".join(repr(row["value"]) for row in values_df.where(same).distinct().take(2))
        raise LcSparkError(
            f"Field '{name}': {pair} have the same 64-bit hash. Change one of them in the source "
            "(a prefix is enough)."
        )
    kept_df = _kept(totals_df.select("field", "hash", "count"), min_counts, given)
    named_df = kept_df.join(values_df, ["field", "hash"]).dropDuplicates(["field", "hash"])
    return _with_special_levels(_ranked(named_df, "value", given), totals_df)


def count_indices(
    train_df: DataFrame,
    base: FieldMap,
    vocabulary: Vocabulary,
    crosses: Sequence[FieldInfo],
) -> DataFrame:
    """Count the cross keys of crosses, and the indices of bucketed and hashed fields of base.

    Returns (field string, key long, count long), summed over all rows.
    """
    counted_fields = [i for i in base.fields if i.kind == "bucketed" or i.hashed is not None]
    crossed = [*crosses, *(info for info in counted_fields if info.kind == "crossed")]
    needed = {i.name for i in counted_fields} | {parent for info in crossed for parent in info.of}
    if not needed:
        return train_df.sparkSession.createDataFrame([], "field string, key long, count long")
    needed_map = FieldMap(tuple(info for info in base.fields if info.name in needed))
    shared = train_df.sparkSession.sparkContext.broadcast((needed_map, vocabulary))
    columns = [prepared_column(info) for info in needed_map.fields if info.kind != "crossed"]

    def counted(batches: Batches) -> Batches:
        field_map, words = shared.value
        for table in _chunks(batches, len(field_map.fields)):
            arrays = {name: table[name].combine_chunks() for name in table.column_names}
            encoded = encode(arrays, field_map, words)
            keys = {info.name: encoded[info.name].ravel() for info in counted_fields}
            keys |= {info.name: cross_keys(info, encoded, field_map) for info in crosses}
            for name, values in keys.items():
                values = values[values >= 0].astype(np.int64)  # drops the padding of lists
                yield _counts_batch(name, pc.value_counts(pa.array(values)))

    counts_df = train_df.select(*columns).mapInArrow(
        counted, "field string, value long, count long"
    )
    return counts_df.groupBy("field", F.col("value").alias("key")).agg(
        F.sum("count").alias("count")
    )


def rank_keys(
    key_counts_df: DataFrame, min_counts: Mapping[str, int], given: Given = FRESH
) -> DataFrame:
    """Rank counted cross keys as rank_values ranks values; key 0 (all parents missing) is index 0.

    Returns (field, index int, key long, hash long, count long); hash is the key.
    """
    totals_df = key_counts_df.where(F.col("field").isin(list(min_counts))).select(
        "field", F.nullif("key", F.lit(0)).alias("hash"), "count"
    )
    if given.known_df is not None:
        known_df = given.known_df.select("field", "hash", F.lit(0).cast("long").alias("count"))
        both = totals_df.unionByName(known_df).groupBy("field", "hash")
        totals_df = both.agg(F.sum("count").alias("count"))
    kept_df = _kept(totals_df, min_counts, given).withColumn("value", F.col("hash"))
    return _with_special_levels(_ranked(kept_df, "hash", given), totals_df)


def _kept(totals_df: DataFrame, min_counts: Mapping[str, int], given: Given) -> DataFrame:
    """Return (field, hash, count, known) of values to index; known is the index of a known one."""
    cuts = F.create_map(*[F.lit(x) for pair in min_counts.items() for x in pair])
    often = F.col("count") >= cuts[F.col("field")]
    valued_df = totals_df.where(F.col("hash").isNotNull())
    if given.known_df is not None:
        known_df = given.known_df.select("field", "hash", F.col("index").alias("known"))
        joined_df = valued_df.join(known_df, ["field", "hash"], how="left")
        return joined_df.where(F.col("known").isNotNull() | often)
    if given.seen_df is not None:
        valued_df = valued_df.join(given.seen_df, ["field", "hash"], how="left_semi")
    return valued_df.where(often).withColumn("known", F.lit(None).cast("int"))


def _ranked(kept_df: DataFrame, tie_breaker: str, given: Given) -> DataFrame:
    new = F.col("known").isNull()
    order = Window.partitionBy("field", new).orderBy(F.desc("count"), F.asc(tie_breaker))
    first: Column = F.lit(OUT_OF_VOCABULARY + 1)
    if given.sizes:
        sizes = F.create_map(*[F.lit(x) for pair in given.sizes.items() for x in pair])
        first = sizes[F.col("field")]
    index = F.coalesce("known", (first + F.row_number().over(order) - 1).cast("int"))
    return kept_df.select("field", index.alias("index"), "value", "hash", "count")


def _with_special_levels(ranked_df: DataFrame, totals_df: DataFrame) -> DataFrame:
    """Add the counts of indices 0 and 1: missing rows, and rows whose value was cut."""
    sums_df = totals_df.groupBy("field").agg(
        F.sum(F.when(F.col("hash").isNull(), F.col("count")).otherwise(0)).alias("missing"),
        F.sum("count").alias("all"),
    )
    kept_df = ranked_df.groupBy("field").agg(F.sum("count").alias("kept"))
    rest = F.col("all") - F.col("missing") - F.coalesce("kept", F.lit(0))
    special_df = (
        sums_df.join(kept_df, "field", how="left")
        .select(
            "field",
            F.explode(
                F.array(
                    F.struct(F.lit(0).alias("index"), F.col("missing").alias("count")),
                    F.struct(F.lit(OUT_OF_VOCABULARY).alias("index"), rest.alias("count")),
                )
            ).alias("level"),
        )
        .select("field", "level.index", "level.count")
    )
    return ranked_df.unionByName(special_df, allowMissingColumns=True)


def to_vocabulary(
    ranked_df: DataFrame, infos: Sequence[FieldInfo], held: int = 0, free: int | None = None
) -> tuple[Vocabulary, dict[str, int]]:
    """Collect ranked values into a Vocabulary, and the number of indices of each field.

    Raises LcSparkError before anything is collected when the values, and `held` others that there
    are already, need more than the `free` bytes of memory (by default: this machine's).
    """
    values_df = ranked_df.where(F.col("hash").isNotNull())
    counted = {r["field"]: r["count"] for r in values_df.groupBy("field").count().collect()}
    refuse_too_many(values_df, counted, held, free)
    names = sorted(counted)
    spark = ranked_df.sparkSession
    # A number in place of the name: a string a row would be more than hash and index together.
    codes_df = spark.createDataFrame(list(enumerate(names)), "code int, field string")
    coded_df = values_df.join(F.broadcast(codes_df), "field").select("code", "hash", "index")
    table = coded_df.toArrow()
    codes = table["code"].combine_chunks()
    field = pa.DictionaryArray.from_arrays(codes, pa.array(names, pa.string()))
    vocabulary = Vocabulary.from_arrow(table.drop_columns(["code"]).append_column("field", field))
    return vocabulary, {i.name: 2 + len(vocabulary.of(i.name)[0]) for i in infos}
