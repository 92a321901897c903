"""Names the levels of fields: what each index of each field stands for, as people read it."""

import itertools

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from lc_spark.features.prepare import number_column
from lc_spark.field_map import FieldInfo, FieldMap

MISSING_LEVEL = "(missing)"
OTHER_LEVEL = "(other)"
VALUE_LEVEL = "(value)"  # the weight that multiplies a continuous value


def name_column() -> Column:
    """Return a level's value, or what stands for missing and for all rare values."""
    return (
        F.when(F.col("value").isNotNull(), F.col("value"))
        .when(F.col("index") == 0, MISSING_LEVEL)
        .otherwise(OTHER_LEVEL)
    )


def plain_levels(
    train_df: DataFrame, field_map: FieldMap, keys_df: DataFrame, n_rows: int
) -> DataFrame:
    """Return the levels of fields without a vocabulary: buckets, hashed values, continuous."""
    spark = train_df.sparkSession
    bucketed = [i for i in field_map.fields if i.kind == "bucketed"]
    names = [(i.name, k, name) for i in bucketed for k, name in enumerate(_bucket_names(i))]
    schema = "field string, index int, value string"
    named_df = spark.createDataFrame(names, schema)
    for info in field_map.fields:
        if info.hashed is not None:
            indices_df = spark.range(info.size).select(
                F.lit(info.name).alias("field"),
                F.col("id").cast("int").alias("index"),
                F.when(F.col("id") > 0, F.concat(F.lit("#"), "id")).alias("value"),
            )
            named_df = named_df.unionByName(indices_df)
    counts_df = keys_df.select("field", F.col("key").cast("int").alias("index"), "count")
    levels_df = named_df.join(counts_df, ["field", "index"], how="left")
    continuous = [i for i in field_map.fields if i.kind == "continuous"]
    present = [F.count(number_column(i.column)).alias(i.name) for i in continuous]
    row = train_df.select(*present).first() if present else None
    numbers = []
    for info in continuous:
        n_present = int(row[info.name]) if row else 0
        numbers += [(info.name, 0, MISSING_LEVEL, n_rows - n_present)]
        numbers += [(info.name, 1, VALUE_LEVEL, n_present)]
    numbers_df = spark.createDataFrame(numbers, f"{schema}, count long")
    plain_df = levels_df.unionByName(numbers_df).withColumn("hash", F.lit(None).cast("long"))
    return plain_df.withColumn("count", F.coalesce("count", F.lit(0)))


def _bucket_names(info: FieldInfo) -> list[str]:
    edges = ["-inf", *(f"{cut:.6g}" for cut in info.cut_points), "inf"]
    pairs = itertools.pairwise(edges)
    return [MISSING_LEVEL, *(f"[{low}, {high})" for low, high in pairs)]


def cross_levels(
    ranked_keys_df: DataFrame, parent_levels_df: DataFrame, field_map: FieldMap
) -> DataFrame:
    """Name the levels of crosses by their parents' levels, such as 'JFK × LAX'."""
    digits = []
    for info in field_map.fields:
        if info.kind == "crossed" and info.hashed is None:
            divisor = 1
            for position in reversed(range(len(info.of))):
                parent = field_map[info.of[position]]
                digits.append((info.name, position, parent.name, divisor, parent.size))
                divisor *= parent.size
    digits_df = ranked_keys_df.sparkSession.createDataFrame(
        digits, "field string, position int, parent string, divisor long, size long"
    )
    parents_df = (
        ranked_keys_df.join(F.broadcast(digits_df), "field")
        .withColumn("parent_index", F.expr("CAST((hash DIV divisor) % size AS INT)"))
        .join(
            parent_levels_df.select(
                F.col("field").alias("parent"),
                F.col("index").alias("parent_index"),
                F.col("value").alias("parent_value"),
            ),
            ["parent", "parent_index"],
        )
    )
    named_df = parents_df.groupBy("field", "index").agg(
        F.sort_array(F.collect_list(F.struct("position", "parent_value"))).alias("parts")
    )
    names = F.array_join(F.col("parts.parent_value"), " × ")
    joined_df = ranked_keys_df.drop("value").join(
        named_df.select("field", "index", names.alias("value")), ["field", "index"], how="left"
    )
    return joined_df.withColumn("value", name_column())
