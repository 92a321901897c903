"""Trains LR with Spark MLlib on the shards, and gives its weights readable values."""

import itertools
import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pyspark.ml.classification import LogisticRegression
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import Column, DataFrame, SparkSession, Window, WindowSpec
from pyspark.sql import functions as F
from pyspark.sql import types as T

from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.features.shards import part_files
from lc_spark.field_map import FieldInfo, FieldMap, require_same
from lc_spark.training import models

MAX_FEATURES = 2**31 - 1  # MLlib's vectors have int32 indices


@dataclass(frozen=True)
class LrFit:
    """A fitted LR: weights float64 [d], and the objective before and after each L-BFGS pass."""

    weights: NDArray[np.float64]
    bias: float
    loss_history: tuple[float, ...]
    iterations: int
    seconds: float


def shard_vectors(
    spark: SparkSession, config: Config, field_map: FieldMap, split: str, folder: str
) -> DataFrame:
    """Return (row_id, label, fold, features) of a split, features as MLlib's sparse vectors.

    The vectors' struct is written to a folder and read back as vectors: Parquet is where Spark
    turns the one into the other without a Python function.
    """
    if field_map.d > MAX_FEATURES:
        raise LcSparkError(
            f"MLlib's vectors hold {MAX_FEATURES:,} features, these fields have {field_map.d:,}: "
            "raise min_count or hash the largest fields."
        )
    shards_df = read_shards(spark, config, split)
    indices, values = [], []
    runs = itertools.groupby(field_map.fields, key=lambda info: info.kind == "multivalued")
    for is_list, run in runs:
        infos = list(run)
        if is_list:
            for info in infos:
                present = F.filter(F.col(f"`{info.name}`"), lambda index: index >= 0)
                indices.append(F.transform(present, _plus(info.offset)))
                values.append(F.array_repeat(F.lit(1.0), F.size(present)))
        else:
            indices.append(F.array(*[_index_column(info) for info in infos]))
            values.append(F.array(*[_value_column(info) for info in infos]))
    vector = F.struct(
        F.lit(0).cast("tinyint").alias("type"),
        F.lit(field_map.d).alias("size"),
        F.concat(*indices).alias("indices"),
        F.concat(*values).alias("values"),
    )
    columns = ["row_id", "label", "fold"]
    shards_df.select(*columns, vector.alias("features")).write.mode("overwrite").parquet(folder)
    schema = T.StructType(
        [*[shards_df.schema[c] for c in columns], T.StructField("features", VectorUDT())]
    )
    return spark.read.schema(schema).parquet(folder)


def _plus(offset: int) -> Any:
    return lambda index: index + F.lit(offset)


def _index_column(info: FieldInfo) -> Column:
    column = F.col(f"`{info.name}`")
    if info.kind == "continuous":
        return F.lit(info.offset) + F.when(F.isnan(column), 0).otherwise(1)
    return F.lit(info.offset) + column


def _value_column(info: FieldInfo) -> Column:
    if info.kind != "continuous":
        return F.lit(1.0)
    column = F.col(f"`{info.name}`").cast("double")
    return F.when(F.isnan(column), 1.0).otherwise(column)


def read_shards(spark: SparkSession, config: Config, split: str) -> DataFrame:
    """Return the encoded rows of a split as the shards hold them."""
    files = part_files(config.workspace_path / "shards", split)
    if not files:
        raise LcSparkError(f"There are no {split} shards: run the stage 'features' first.")
    return spark.read.parquet(*map(str, files))


def fit_lr(vectors_df: DataFrame, config: Config) -> LrFit:
    """Fit MLlib's LogisticRegression by L-BFGS on (label, features)."""
    estimator = LogisticRegression(
        maxIter=config.lr.max_iterations,
        regParam=config.lr.l2,
        tol=config.lr.tolerance,
        standardization=False,  # one-hot inputs share a scale; continuous ones are standardised
    )
    started = time.perf_counter()
    model = estimator.fit(vectors_df)
    seconds = time.perf_counter() - started
    summary = model.summary
    return LrFit(
        weights=model.coefficients.toArray(),
        bias=float(model.intercept),
        loss_history=tuple(summary.objectiveHistory),
        iterations=int(summary.totalIterations),
        seconds=seconds,
    )


def save_lr(fit: LrFit, config: Config, field_map: FieldMap) -> None:
    """Write models/lr, which the LC systems start from and which is scored as they are."""
    facts = {
        "bias": fit.bias,
        "loss_history": fit.loss_history,
        "iterations": fit.iterations,
        "seconds": fit.seconds,
    }
    network = models.Lr.from_weights(fit.weights, fit.bias)
    models.save(network, config.workspace_path / "models" / "lr", field_map.fingerprint, facts)


def lr_weights_df(
    spark: SparkSession, fit: LrFit, levels_df: DataFrame, field_map: FieldMap
) -> DataFrame:
    """Return (field, value, index, count, weight), one row a feature."""
    lengths = [info.size for info in field_map.fields]
    table = pd.DataFrame(
        {
            "field": np.repeat([info.name for info in field_map.fields], lengths),
            "index": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
            "weight": fit.weights,
        }
    )
    weights_df = spark.createDataFrame(table, "field string, index int, weight double")
    return weights_df.join(levels_df, ["field", "index"], how="left").select(
        "field", "value", "index", "count", "weight"
    )


def field_importance_df(weights_df: DataFrame) -> DataFrame:
    """Return (field, features, importance), the most important first.

    importance is the standard deviation, over the train rows, of what the field adds to LR's
    logit. A continuous value has sd 1 on the train rows, so its |weight| is that deviation.
    """
    share = F.col("count") / F.sum("count").over(_by_field())
    mean = F.sum(share * F.col("weight")).over(_by_field())
    spread_df = weights_df.withColumn("part", share * (F.col("weight") - mean) ** 2)
    value_weight = F.max(F.when(F.col("value") == "(value)", F.abs("weight")))
    return (
        spread_df.groupBy("field")
        .agg(
            F.count("*").alias("features"),
            F.coalesce(value_weight, F.sqrt(F.sum("part"))).alias("importance"),
        )
        .orderBy(F.desc("importance"), "field")
    )


def _by_field() -> WindowSpec:
    return Window.partitionBy("field")


def read_facts(config: Config, field_map: FieldMap) -> dict[str, Any]:
    """Return what save_lr noted about the fit; refuses an LR of another field map."""
    path = config.workspace_path / "models" / "lr" / "model.json"
    if not path.is_file():
        raise LcSparkError("There is no LR model: run the stage 'train_lr' first.")
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    require_same(field_map.fingerprint, facts["fingerprint"], "The LR model")
    return facts
