"""The direct way of wide columns, from files to Python, against the way through Spark's rows."""

import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ConfigMaker, levels_of
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from lc_spark import tables
from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.features.direct import direct_fields
from lc_spark.features.discretize import summary
from lc_spark.features.fit import Fitted, Grown, fit_features
from lc_spark.features.prepare import column_types
from lc_spark.features.shards import SPLITS, part_files, write_shards
from lc_spark.tables import FILE

FIELDS = [
    {"name": "site", "kind": "categorical"},
    {"name": "page", "kind": "categorical", "min_count": 1},
    {"name": "slots", "kind": "categorical", "hashed": 7},
    {"name": "code", "kind": "categorical"},  # of numbers: through Spark
    {"name": "tags", "kind": "multivalued", "delimiter": "|"},  # likewise
    {"name": "age", "kind": "bucketed", "buckets": 4},
    {"name": "price", "kind": "continuous"},
    {"name": "big", "kind": "continuous"},
    {"kind": "crossed", "of": ["site", "age"], "min_count": 1},
]
DAYS = [datetime.date(2024, 1, 1) + datetime.timedelta(days=i) for i in range(3)]


def raw_df(spark: SparkSession, rows: int = 3000) -> DataFrame:
    """Rows with what is odd: null, empty, NaN, no ASCII, bytes that are no UTF-8, huge longs."""
    n = F.col("id")
    return spark.range(rows).select(
        n.alias("row_id"),
        (n % 3 == 0).cast("float").alias("label"),
        F.element_at(F.array(*[F.lit(day) for day in DAYS]), (n % 3 + 1).cast("int")).alias("date"),
        F.when(n % 11 == 0, None)
        .when(n % 7 == 0, "")
        .otherwise(F.concat(F.lit("sé"), n % 40))
        .alias("site"),
        F.when(n % 5 == 0, F.expr("CAST(X'FF41' AS STRING)"))
        .otherwise(n.cast("string"))
        .alias("page"),
        F.concat(F.lit("slot"), n % 19).alias("slots"),
        (n % 13).cast("int").alias("code"),
        F.concat_ws("|", n % 3, n % 4).alias("tags"),
        F.when(n % 10 == 0, None).otherwise(n % 90).cast("smallint").alias("age"),
        F.when(n % 9 == 0, float("nan")).when(n % 8 != 0, n / 7).alias("price"),
        ((n % 1000 + 1) * 2**53 + 1).alias("big"),
    )


def stored(spark: SparkSession, config: Config, df: DataFrame) -> DataFrame:
    tables.write(df.repartition(2), config, "raw", ("date",))
    return tables.read_with_places(spark, config, "raw", tables.version(spark, config, "raw"))


def features(df: DataFrame, config: Config) -> tuple[Fitted, list[pd.DataFrame]]:
    """Return what is learnt of some of the rows, and the content of the part files of all."""
    fitted = fit_features(df.where("row_id % 4 != 0"), config.fields, config.seed)
    write_shards(df, fitted.field_map, fitted.vocabulary, config, 0)
    folder = config.run_path / "shards"
    parts = [pq.read_table(path).to_pandas() for s in SPLITS for path in part_files(folder, s)]
    return fitted, parts


def test_both_ways_learn_and_write_the_same(spark: SparkSession, make_config: ConfigMaker) -> None:
    settings = {"fields": FIELDS, "shards": {"rows_per_group": 300, "folds": 3}}
    config, other = make_config(settings), make_config(settings)
    direct_df = stored(spark, config, raw_df(spark))
    through_df = tables.read(spark, config, "raw")
    assert FILE in direct_df.columns
    assert FILE not in through_df.columns
    (direct, parts), (through, expected) = features(direct_df, config), features(through_df, other)
    assert direct.field_map.fingerprint == through.field_map.fingerprint
    levels = [levels_of(fit) for fit in (direct, through)]
    assert levels[0] == levels[1]
    for part, one in zip(parts, expected, strict=True):
        pd.testing.assert_frame_equal(part, one)
    assert sum(map(len, parts)) == 3000


def test_texts_that_spark_hands_on_with_long_offsets_are_no_others(
    spark: SparkSession, make_config: ConfigMaker
) -> None:
    config = make_config({"fields": FIELDS})
    df = stored(spark, config, raw_df(spark, 300))
    expected = fit_features(df, config.fields, 0)
    levels_df = spark.createDataFrame(pa.Table.from_batches(expected.levels.batches()))
    old = Grown(expected.field_map, levels_df)
    spark.conf.set("spark.sql.execution.arrow.useLargeVarTypes", "true")
    try:
        found = fit_features(df, config.fields, 0)
        grown = fit_features(df, config.fields, 0, old)
    finally:
        spark.conf.unset("spark.sql.execution.arrow.useLargeVarTypes")
    assert levels_of(found) == levels_of(grown) == levels_of(expected)


def test_row_groups_files_and_filters_are_put_together(
    spark: SparkSession, make_config: ConfigMaker
) -> None:
    config = make_config({"fields": FIELDS[:2]})
    spark.conf.set("parquet.block.size", "4096")
    try:
        df = stored(spark, config, raw_df(spark, 20_000))
    finally:
        spark.conf.unset("parquet.block.size")
    found = df.select(FILE).distinct().collect()
    groups = [pq.ParquetFile(row[0].removeprefix("file://")).num_row_groups for row in found]
    assert len(groups) > 1
    assert max(groups) > 1
    few_df = df.where("row_id % 17 = 3")
    fitted = fit_features(few_df, config.fields, 0)
    counted = {row["value"]: row["count"] for row in levels_of(fitted, "site")}
    expected = {
        row["site"]: row["count"]
        for row in raw_df(spark, 20_000).where("row_id % 17 = 3").groupBy("site").count().collect()
    }
    missing = expected.pop(None, 0) + expected.pop("", 0)
    assert counted.pop("(missing)") == missing
    assert counted.pop("(other)") == 0
    assert counted == expected


def test_a_column_that_later_days_brought_is_missing_before(
    spark: SparkSession, make_config: ConfigMaker
) -> None:
    config = make_config({"fields": [FIELDS[0], FIELDS[6]]})
    df = raw_df(spark)
    first, second = (tables.date_condition("date", day) for day in DAYS[:2])
    tables.write(df.where(first).drop("site", "price"), config, "raw", ("date",))
    tables.write(df.where(second), config, "raw", ("date",), second)
    both_df = tables.read_with_places(spark, config, "raw", tables.version(spark, config, "raw"))
    assert FILE in both_df.columns
    fitted = fit_features(both_df, config.fields, 0)
    through = fit_features(tables.read(spark, config, "raw"), config.fields, 0)
    levels = [levels_of(fit) for fit in (fitted, through)]
    assert levels[0] == levels[1]
    missing = {r["field"]: r["count"] for r in levels[0] if r["value"] == "(missing)"}
    assert missing["site"] > 1000
    assert missing["price"] > 1000


@pytest.mark.parametrize(
    "odd",
    [
        lambda df: df.withColumnRenamed("site", "the site"),  # another name in the files
        lambda df: df,
    ],
)
def test_delta_reads_what_it_alone_can(
    spark: SparkSession, make_config: ConfigMaker, odd: Any, tmp_path: Path
) -> None:
    renamed = "the site" in odd(raw_df(spark, 10)).columns
    workspace = tmp_path / ("plain" if renamed else "with [a] pattern")
    config = make_config({"workspace": str(workspace)})
    df = stored(spark, config, odd(raw_df(spark, 100)))
    assert FILE not in df.columns
    assert df.count() == 100


def test_files_are_found_whatever_the_folder_is_called(
    spark: SparkSession, make_config: ConfigMaker, tmp_path: Path
) -> None:
    workspace = tmp_path / "50 %, 1%20 é #"
    config = make_config({"fields": FIELDS[:1], "workspace": str(workspace)})
    df = stored(spark, config, raw_df(spark, 100))
    assert FILE in df.columns
    assert df.count() == 100
    assert len(levels_of(fit_features(df, config.fields, 0), "site")) > 20


def test_numbers_without_a_mean_are_refused_with_their_range(
    spark: SparkSession, make_config: ConfigMaker
) -> None:
    config = make_config({"fields": [FIELDS[6]]})
    largest = F.when(F.col("row_id") == 5, 1.7e308).otherwise(F.col("price"))
    df = stored(spark, config, raw_df(spark, 100).withColumn("price", largest))
    for way_df in (df, tables.read(spark, config, "raw")):
        with pytest.raises(LcSparkError, match=r"'price'.*, 0\.\d+ to 1\.7e\+308, are too large"):
            fit_features(way_df, config.fields, 0)


def test_only_texts_and_numbers_of_rows_with_places_are_direct(
    spark: SparkSession, make_config: ConfigMaker
) -> None:
    config = make_config({"fields": FIELDS})
    df = stored(spark, config, raw_df(spark, 300))
    fitted = fit_features(df, config.fields, 0)
    infos = fitted.field_map.fields
    names = {info.name for info in direct_fields(df, infos)}
    assert names == {"site", "page", "slots", "age", "price", "big"}
    # Later rows may be of other types than those of a model, or lack a column.
    changed_df = df.withColumn("site", F.length("site")).withColumn("age", F.col("age").cast("int"))
    changed = {info.name for info in direct_fields(changed_df.drop("price"), infos)}
    assert changed == {"page", "slots", "big"}
    through_df = tables.read(spark, config, "raw")
    assert direct_fields(through_df, infos) == []


def test_moments_of_numbers_are_those_of_sparks_aggregates(
    spark: SparkSession, make_config: ConfigMaker
) -> None:
    n = F.col("id")
    odd_df = spark.range(1000).select(
        n.alias("row_id"),
        F.lit(datetime.date(2024, 1, 1)).alias("date"),
        F.when(n % 5 == 0, float("inf")).when(n % 7 == 0, float("nan")).otherwise(n).alias("wide"),
        F.when(n % 3 > 0, 1e9 + n / 1000).cast("float").alias("close"),  # far from 0 for its sd
        F.when(n == 500, n).cast("int").alias("once"),
        F.lit(None).cast("double").alias("gone"),
        F.when(n % 2 == 0, float("-inf")).alias("endless"),
        (n * 2**52 + 1).alias("huge"),
    )
    names = ["wide", "close", "once", "gone", "endless", "huge"]
    config = make_config({"fields": [{"name": n, "kind": "continuous"} for n in names]})
    direct_df = stored(spark, config, odd_df)
    types = column_types(direct_df, config.fields)
    direct = summary(direct_df, config.fields, types)
    through = summary(direct_df.drop(FILE), config.fields, types)
    assert set(direct) == set(through)
    for what, value in through.items():
        found = direct[what]
        assert found is None if value is None else found == pytest.approx(value, rel=1e-9), what
    assert (direct["rows"], direct["present once"], direct["sd once"]) == (1000, 1, 0.0)
    assert (direct["present endless"], direct["min endless"], direct["mean gone"]) == (
        500,
        None,
        None,
    )
