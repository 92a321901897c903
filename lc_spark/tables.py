"""The only reader and writer of Delta: the tables under ``workspace/tables``."""

import datetime
from typing import Literal

from delta.tables import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from lc_spark import files
from lc_spark.config import Config
from lc_spark.errors import LcSparkError

TableName = Literal[
    "raw",
    "rejected",
    "vocabulary",
    "lr_weights",
    "test_scores",
    "evaluation",
    "experiment_scores",
    "scores",
]

WRITTEN_BY = {
    "raw": "ingest",
    "rejected": "ingest",
    "vocabulary": "features",
    "lr_weights": "train_lr",
    "test_scores": "evaluate",
    "evaluation": "evaluate",
    "experiment_scores": "experiment",
    "scores": "score",
}
READ_BY_DELTA = {"delta.columnMapping.mode", "delta.enableDeletionVectors"}  # properties
GLOB = set("*?[]{}\\")  # Spark takes them in a path for a pattern
FILE, ROW = "__file", "__row"  # where a row lies: the URI of its file, its number there
NEEDS_MAPPING = set(" ,;{}()\n\t=")  # Delta takes these in column names only by a mapping


def path_of(config: Config, name: TableName) -> str:
    """Return the folder of a table, as a URI."""
    return files.uri(config.workspace_path / "tables" / name)


def exists(spark: SparkSession, config: Config, name: TableName) -> bool:
    """Return whether the table was ever written."""
    return DeltaTable.isDeltaTable(spark, path_of(config, name))


def _require(spark: SparkSession, config: Config, name: TableName) -> None:
    if not exists(spark, config, name):
        raise LcSparkError(
            f"There is no table '{name}' in {config.workspace}: run the stage "
            f"'{WRITTEN_BY[name]}' first."
        )


def read(
    spark: SparkSession, config: Config, name: TableName, version: int | None = None
) -> DataFrame:
    """Return a table, as it is or as it was at a version.

    Raises LcSparkError, with the stage to run, when it does not exist.
    """
    _require(spark, config, name)
    reader = spark.read.format("delta")
    if version is not None:
        reader = reader.option("versionAsOf", version)
    return reader.load(path_of(config, name))


def write(
    df: DataFrame,
    config: Config,
    name: TableName,
    partition_by: tuple[str, ...] = (),
    replace_where: str | None = None,
) -> int:
    """Overwrite a table, or only the rows that a condition owns, in one commit.

    Returns the version that the commit made.
    """
    writer = df.write.format("delta").mode("overwrite").partitionBy(*partition_by)
    path = path_of(config, name)
    if any(NEEDS_MAPPING & set(column) for column in df.columns):
        writer = writer.option("delta.columnMapping.mode", "name")
    if replace_where is not None and exists(df.sparkSession, config, name):
        # A column that is new from now on is null in the rows before.
        writer = writer.option("replaceWhere", replace_where).option("mergeSchema", "true")
    else:
        writer = writer.option("overwriteSchema", "true")
    writer.save(path)
    return version(df.sparkSession, config, name)


def version(spark: SparkSession, config: Config, name: TableName) -> int:
    """Return the present version of a table; raises LcSparkError, as read, when there is none."""
    _require(spark, config, name)
    row = DeltaTable.forPath(spark, path_of(config, name)).history(1).select("version").first()
    if row is None:
        raise LcSparkError(f"The table '{name}' in {config.workspace} has no history.")
    return int(row[0])


def read_with_places(
    spark: SparkSession, config: Config, name: TableName, version: int
) -> DataFrame:
    """Return a table as it was at a version, with FILE and ROW where Delta is not needed
    to read its files: no column has another name there, no row is marked as deleted.
    """
    table_df = read(spark, config, name, version)
    detail = DeltaTable.forPath(spark, path_of(config, name)).detail().select("properties").first()
    assert detail is not None, "a table has a detail"
    places = sorted(table_df.inputFiles())
    if READ_BY_DELTA & set(detail["properties"]) or any(GLOB & set(place) for place in places):
        return table_df
    reader = spark.read.schema(table_df.schema).option("basePath", path_of(config, name))
    # Delta's own reader does not tell the number of a row.
    return with_places(reader.parquet(*places))


def with_places(parquet_df: DataFrame) -> DataFrame:
    """Return rows that Spark reads from Parquet files with FILE and ROW."""
    file, row = F.col("_metadata.file_path"), F.col("_metadata.row_index")
    return parquet_df.select("*", file.alias(FILE), row.alias(ROW))


def date_condition(column: str, day: datetime.date, first: datetime.date | None = None) -> str:
    """Return the replaceWhere condition of one day's partition, or of those from first to day."""
    if first is None:
        return f"{column} = DATE'{day.isoformat()}'"
    return f"{column} >= DATE'{first.isoformat()}' AND {column} <= DATE'{day.isoformat()}'"


def read_delta(spark: SparkSession, path: str) -> DataFrame:
    """Return somebody else's Delta table, as a source of raw rows."""
    if not DeltaTable.isDeltaTable(spark, path):
        raise LcSparkError(f"source.path: there is no Delta table at '{path}'.")
    return spark.read.format("delta").load(path)
