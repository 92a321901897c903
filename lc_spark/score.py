"""Turns shards, or raw rows and a bundle, into scores on the executors."""

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import torch
from pyspark.sql import DataFrame, SparkSession

from lc_spark.config import Config
from lc_spark.features.prepare import prepared_column
from lc_spark.field_map import FieldMap, require_same
from lc_spark.training import models
from lc_spark.training.lr import read_shards
from lc_spark.training.scorer import Scorer, encoded_columns, score_encoded

Batches = Iterable[pa.RecordBatch]


def shard_scores_df(
    spark: SparkSession, config: Config, field_map: FieldMap, model_folder: Path, split: str
) -> DataFrame:
    """Return (row_id long, label float, score double) of every row of a split's shards."""
    model, description = models.load(model_folder)
    require_same(field_map.fingerprint, description["fingerprint"], f"The model in {model_folder}")
    shared = spark.sparkContext.broadcast((field_map, model))

    def score(batches: Batches) -> Batches:
        torch.set_num_threads(1)  # the task has one core
        fields, network = shared.value
        for batch in batches:
            scores = score_encoded(network, encoded_columns(batch, fields), fields)
            arrays = [batch.column("row_id"), batch.column("label"), pa.array(scores)]
            yield pa.RecordBatch.from_arrays(arrays, names=["row_id", "label", "score"])

    shards_df = read_shards(spark, config, split)
    names = ["row_id", "label", *(f"`{info.name}`" for info in field_map.fields)]
    return shards_df.select(*names).mapInArrow(score, "row_id long, label float, score double")


def raw_scores_df(raw_df: DataFrame, bundle: Path) -> DataFrame:
    """Return (row_id long, date, score double) of raw rows, scored by a bundle."""
    scorer = Scorer(bundle)
    shared = raw_df.sparkSession.sparkContext.broadcast(scorer)
    keep = ["row_id", "date"]

    def score(batches: Batches) -> Batches:
        torch.set_num_threads(1)
        ready = shared.value
        for batch in batches:
            columns = {name: batch.column(name) for name in batch.schema.names}
            scores = pa.array(ready.score_prepared(columns))
            arrays = [*(columns[name] for name in keep), scores]
            yield pa.RecordBatch.from_arrays(arrays, names=[*keep, "score"])

    prepared = [prepared_column(i) for i in scorer.field_map.fields if i.kind != "crossed"]
    return raw_df.select(*keep, *prepared).mapInArrow(score, "row_id long, date date, score double")
