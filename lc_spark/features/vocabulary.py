"""Counts the values of fields, and the indices of parents and crosses, on the train rows."""

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from lc_spark.encoder import Vocabulary, cross_keys, encode
from lc_spark.features.counts import BUNDLES, Counts
from lc_spark.features.direct import Tally, direct_fields, pieces
from lc_spark.features.prepare import prepared_column, texts_column
from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.tables import FILE, ROW

BUCKETS_A_TASK = 128  # whose cells a task counts, at most: a billion
Batches = Iterable[pa.RecordBatch]


def count_values(
    train_df: DataFrame, infos: Sequence[FieldInfo], buckets: int, column: str = "count"
) -> DataFrame:
    """Count the values of categorical and multivalued fields.

    Returns bundles (counts.py), of so many buckets, with the counts in a column of that name: a
    distinct value once for each task, or more often where a task meets very many of them.
    """
    directly = direct_fields(train_df, infos)
    others = [info for info in infos if info not in directly]
    # min_count counts rows: a value twice in one row is still one row.
    columns = [
        (texts_column(i) if i.kind == "categorical" else F.array_distinct(texts_column(i))).alias(
            i.name
        )
        for i in others
    ]
    columns += [F.col(FILE), F.col(ROW)] if directly else []

    def counted(batches: Batches) -> Batches:
        held, tally = Counts(column, buckets), Tally(directly)
        for piece in pieces(batches, directly):
            for info in others:
                values = piece.batch.column(info.name)
                if pa.types.is_list(values.type):
                    values = _flat_or_missing(values)
                counts = pc.value_counts(values)
                held.add(info.name, counts.field("values"), counts.field("counts"))
            for found in tally.add(piece):
                held.add(*found)
                yield from held.relieve()
            yield from held.relieve()
        for found in tally.give():
            held.add(*found)
            yield from held.relieve()
        yield from held.give()

    return _in_few_tasks(train_df.select(*columns), buckets).mapInArrow(counted, BUNDLES)


def _in_few_tasks(df: DataFrame, buckets: int) -> DataFrame:
    """Coalesce: the more rows a task counts, the fewer values are passed on by several.

    A cluster that grows as it is asked to may have few cores yet: then by what there is to count.
    """
    cores = df.sparkSession.sparkContext.defaultParallelism
    return df.coalesce(max(2 * cores, buckets // BUCKETS_A_TASK))


def _flat_or_missing(lists: pa.Array) -> pa.Array:
    """Flatten lists; an empty or missing list counts as one missing value."""
    filled = pc.sum(pc.greater(pc.list_value_length(lists), 0)).as_py() or 0  # None if all are null
    n_missing = len(lists) - filled
    missing = pa.nulls(n_missing, lists.type.value_type)
    return pa.concat_arrays([pc.list_flatten(lists), missing])


def count_indices(
    train_df: DataFrame,
    base: FieldMap,
    vocabulary: Vocabulary,
    crosses: Sequence[FieldInfo],
    buckets: int,
    column: str = "count",
) -> DataFrame:
    """Count the cross keys of crosses, and the indices of bucketed and hashed fields of base.

    Returns bundles as count_values does, the key in the place of the hash. Key 0, all parents
    missing, and index 0 stand for missing.
    """
    counted_fields = [i for i in base.fields if i.kind == "bucketed" or i.hashed is not None]
    crossed = [*crosses, *(info for info in counted_fields if info.kind == "crossed")]
    needed = {i.name for i in counted_fields} | {parent for info in crossed for parent in info.of}
    needed_map = FieldMap(tuple(info for info in base.fields if info.name in needed))
    shared = train_df.sparkSession.sparkContext.broadcast((needed_map, vocabulary))
    columns = [prepared_column(info) for info in needed_map.fields if info.kind != "crossed"]

    def counted(batches: Batches) -> Batches:
        field_map, words = shared.value
        held = Counts(column, buckets)
        for batch in batches:
            arrays = dict(zip(batch.schema.names, batch.columns, strict=True))
            encoded = encode(arrays, field_map, words)
            keys = {info.name: encoded[info.name].ravel() for info in counted_fields}
            keys |= {info.name: cross_keys(info, encoded, field_map) for info in crosses}
            for name, values in keys.items():
                values = values[values >= 0].astype(np.int64)  # drops the padding of lists
                counts = pc.value_counts(pa.array(values, mask=values == 0))
                held.add(name, counts.field("values"), counts.field("counts"))
            yield from held.relieve()
        yield from held.give()

    return _in_few_tasks(train_df.select(*columns), buckets).mapInArrow(counted, BUNDLES)
