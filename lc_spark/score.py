"""Turns shards, or raw rows and a bundle, into scores on the executors."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from lc_spark.config import Config
from lc_spark.encoder import encode
from lc_spark.errors import LcSparkError
from lc_spark.features import drift
from lc_spark.features.direct import Preparer, narrow_df, pieces
from lc_spark.features.drift import FieldCounts
from lc_spark.features.shards import encoded_columns
from lc_spark.features.vectors import read_shards
from lc_spark.field_map import FieldMap, require_same
from lc_spark.files import AnyPath
from lc_spark.training import models
from lc_spark.training.scorer import Scorer, score_encoded, score_ids

Batches = Iterable[pa.RecordBatch]
SCORED = ["system", "row_id", "label", "score"]
MODEL_BYTES = 2**29  # models that a task holds at once
# Column -> its type in Spark and in Arrow: of a row that was scored, or set aside, or of counts.
KEPT = {
    "row_id": ("long", pa.int64()),
    "date": ("date", pa.date32()),
    "score": ("double", pa.float64()),
    "aside": ("string", pa.string()),
    "counts": ("array<long>", pa.list_(pa.int64())),
}


def shard_scores_df(
    spark: SparkSession,
    config: Config,
    field_map: FieldMap,
    folders: Mapping[str, AnyPath],
    split: str,
) -> DataFrame:
    """Return (system, row_id long, label float, score double) of every row of a split's shards.

    folders are the model folders by system; a row is read once for as many of them as a task has
    the memory for.
    """
    shards_df = read_shards(spark, config, split)
    names = ["row_id", "label", *(f"`{info.name}`" for info in field_map.fields)]
    shards_df = shards_df.select(*names)
    parts = [
        _scored_df(shards_df, field_map, {name: folders[name] for name in together})
        for together in _batches_of_models(folders)
    ]
    return functools.reduce(DataFrame.unionByName, parts)


def _batches_of_models(folders: Mapping[str, AnyPath]) -> list[list[str]]:
    batches: list[list[str]] = [[]]
    held = 0
    for name, folder in folders.items():
        path = folder / models.MODEL_FILE
        size = path.stat().st_size if path.is_file() else 0
        if batches[-1] and held + size > MODEL_BYTES:
            batches.append([])
            held = 0
        batches[-1].append(name)
        held += size
    return batches


def _scored_df(
    shards_df: DataFrame, field_map: FieldMap, folders: Mapping[str, AnyPath]
) -> DataFrame:
    networks = {}
    for name, folder in folders.items():
        networks[name], description = models.load(folder)
        require_same(field_map.fingerprint, description["fingerprint"], f"The model in {folder}")
    shared = shards_df.sparkSession.sparkContext.broadcast((field_map, networks))

    def score(batches: Batches) -> Batches:
        torch.set_num_threads(1)  # the task has one core
        fields, ready = shared.value
        for batch in batches:
            ids, values = models.to_tensors(encoded_columns(batch, fields), fields)
            for name, network in ready.items():
                system = pa.array(np.repeat(name, batch.num_rows), pa.string())
                scores = pa.array(score_ids(network, ids, values))
                arrays = [system, batch.column("row_id"), batch.column("label"), scores]
                yield pa.RecordBatch.from_arrays(arrays, names=SCORED)

    return shards_df.mapInArrow(score, "system string, row_id long, label float, score double")


def raw_scores_df(raw_df: DataFrame, bundle: Path, keep: tuple[str, ...]) -> DataFrame:
    """Return the columns to keep and the score (double) of rows of ``raw``, scored by a bundle.

    Raises LcSparkError when ``raw`` lacks a column that the bundle's model reads.
    """
    scorer = Scorer(bundle)
    lacking = [c for c in scorer.field_map.raw_columns if c not in raw_df.columns]
    if lacking:
        raise LcSparkError(
            f"The model in {bundle} reads column '{lacking[0]}', which 'raw' lacks: a champion of "
            "other columns can only be replaced by hand (lc-spark promote)."
        )
    shared = raw_df.sparkSession.sparkContext.broadcast(scorer)
    passed_df, directly = narrow_df(raw_df, scorer.field_map, keep)

    def score(batches: Batches) -> Batches:
        torch.set_num_threads(1)  # the task has one core
        ready, preparer = shared.value, Preparer(directly)
        for piece in pieces(batches, directly):
            columns = {name: piece.batch.column(name) for name in piece.batch.schema.names}
            scores = pa.array(ready.score_prepared(columns | preparer.prepare(piece)))
            arrays = [*(columns[name] for name in keep), scores]
            yield pa.RecordBatch.from_arrays(arrays, names=[*keep, "score"])

    kept = raw_df.select(*keep).schema.fields
    schema = ", ".join([*(f"{c.name} {c.dataType.simpleString()}" for c in kept), "score double"])
    return passed_df.mapInArrow(score, schema)


@dataclass(frozen=True)
class Scored:
    """What became of raw rows: scored, or set aside by reason."""

    scores_df: DataFrame  # row_id long, date, score double
    rows: int
    set_aside: dict[str, int]
    counts: FieldCounts


@contextmanager
def scored_rows(rows_df: DataFrame, bundle: Path) -> Iterator[Scored]:
    """Score rows as ``raw`` has them by a bundle, in one pass; within the block they are kept.

    A row whose column __aside (if there is one) is not null is set aside for that reason.
    """
    scorer = Scorer(bundle)
    if "__aside" not in rows_df.columns:
        rows_df = rows_df.withColumn("__aside", F.lit(None).cast("string"))
    kept_df = _with_counts_df(rows_df, scorer).persist(StorageLevel.MEMORY_AND_DISK)
    try:
        found = kept_df.where("counts IS NULL").groupBy("aside").count().collect()
        n: dict[str | None, int] = {row["aside"]: row["count"] for row in found}
        rows = n.pop(None, 0)
        total = drift.sum_counts(kept_df)
        counts = drift.by_field(total, scorer.field_map, rows)
        scores_df = kept_df.where("score IS NOT NULL").select("row_id", "date", "score")
        yield Scored(scores_df, rows, {str(reason): k for reason, k in n.items()}, counts)
    finally:
        kept_df.unpersist()


def _with_counts_df(rows_df: DataFrame, scorer: Scorer) -> DataFrame:
    """Return a row for each row, scored or aside, and one for each partition with its counts."""
    shared = rows_df.sparkSession.sparkContext.broadcast(scorer)
    passed_df, directly = narrow_df(rows_df, scorer.field_map, ("row_id", "date", "__aside"))
    nothing = {"row_id": None, "date": None, "score": None, "aside": None, "counts": None}

    def score(batches: Batches) -> Batches:
        torch.set_num_threads(1)
        ready, preparer = shared.value, Preparer(directly)
        total = np.zeros(sum(map(drift.n_groups, ready.field_map.fields)), np.int64)
        for piece in pieces(batches, directly):
            fit = pc.is_null(piece.batch.column("__aside"))
            good, bad = piece.batch.filter(fit), piece.batch.filter(pc.invert(fit))
            columns = {name: good.column(name) for name in good.schema.names}
            prepared = preparer.prepare(piece)
            columns |= {name: column.filter(fit) for name, column in prepared.items()}
            encoded = encode(columns, ready.field_map, ready.vocabulary)
            total += drift.count(encoded, ready.field_map)
            scores = score_encoded(ready.model, encoded, ready.field_map)
            ids = {name: columns[name] for name in ("row_id", "date")}
            yield _record_batch({**nothing, **ids, "score": scores}, good.num_rows)
            yield _record_batch({**nothing, "aside": bad.column("__aside")}, bad.num_rows)
        yield _record_batch({**nothing, "counts": [total]}, 1)

    schema = ", ".join(f"{name} {kind}" for name, (kind, _) in KEPT.items())
    return passed_df.mapInArrow(score, schema)


def _record_batch(columns: Mapping[str, Any], n: int) -> pa.RecordBatch:
    arrays = [
        pa.nulls(n, kind) if columns[name] is None else pa.array(columns[name], kind)
        for name, (_, kind) in KEPT.items()
    ]
    return pa.RecordBatch.from_arrays(arrays, names=list(KEPT))
