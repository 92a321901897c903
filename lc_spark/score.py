"""Turns shards, or raw rows and a bundle, into scores on the executors."""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from pyspark.sql import DataFrame, SparkSession

from lc_spark.config import Config
from lc_spark.features.prepare import prepared_column
from lc_spark.features.vectors import read_shards
from lc_spark.field_map import FieldMap, require_same
from lc_spark.files import AnyPath
from lc_spark.training import models
from lc_spark.training.scorer import Scorer, encoded_columns, score_ids

Batches = Iterable[pa.RecordBatch]
SCORED = ["system", "row_id", "label", "score"]
MODEL_BYTES = 2**29  # models that a task holds at once


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


def raw_scores_df(
    raw_df: DataFrame, bundle: Path, keep: tuple[str, ...] = ("row_id", "date")
) -> DataFrame:
    """Return the columns to keep and the score (double) of raw rows, scored by a bundle."""
    scorer = Scorer(bundle)
    shared = raw_df.sparkSession.sparkContext.broadcast(scorer)

    def score(batches: Batches) -> Batches:
        torch.set_num_threads(1)
        ready = shared.value
        for batch in batches:
            columns = {name: batch.column(name) for name in batch.schema.names}
            scores = pa.array(ready.score_prepared(columns))
            arrays = [*(columns[name] for name in keep), scores]
            yield pa.RecordBatch.from_arrays(arrays, names=[*keep, "score"])

    kept = raw_df.select(*keep).schema.fields
    schema = ", ".join([*(f"{c.name} {c.dataType.simpleString()}" for c in kept), "score double"])
    prepared = [prepared_column(i) for i in scorer.field_map.fields if i.kind != "crossed"]
    return raw_df.select(*keep, *prepared).mapInArrow(score, schema)
