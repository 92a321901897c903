"""Turns shards back into a DataFrame: encoded rows, or MLlib's sparse vectors."""

import itertools
from typing import Any

from pyspark.ml.linalg import VectorUDT
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.features.shards import part_files
from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.files import uri

MAX_FEATURES = 2**31 - 1  # MLlib's vectors have int32 indices


def shard_vectors(
    spark: SparkSession, config: Config, field_map: FieldMap, split: str, folder: str
) -> DataFrame:
    """Return (row_id, label, fold, date, features) of a split, features as MLlib's sparse vectors.

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
    columns = ["row_id", "label", "fold", "date"]
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
    files = part_files(config.run_path / "shards", split)
    if not files:
        raise LcSparkError(f"There are no {split} shards: run the stage 'features' first.")
    return spark.read.parquet(*map(uri, files))
