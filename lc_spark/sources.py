"""Reads the source that a config names, joined with its other tables, as one DataFrame.

A line that does not parse is a row all the same, with its text in the column CORRUPT.
"""

import datetime
import functools
import logging
from typing import Any

from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from lc_spark import datasets, files, tables
from lc_spark.config import Config
from lc_spark.errors import LcSparkError, nearest
from lc_spark.source_settings import Files, Joined

log = logging.getLogger("lc_spark")

CORRUPT = "__corrupt"


def read_source(
    spark: SparkSession,
    config: Config,
    date: datetime.date | None,
    first: datetime.date | None = None,
) -> DataFrame:
    """Return the rows of a day's files, or of all, with the columns of source.join beside them.

    With `first` those of the days from it to date, as far as there are files of them.

    Columns of a CSV are strings. Raises LcSparkError for what cannot be read or joined.
    """
    source = config.source
    if source.dataset is not None:
        folder = config.workspace_path / "source"
        rows_df = spark.read.parquet(files.uri(datasets.materialize(source.dataset, folder)))
    else:
        rows_df = read_files(spark, source, _paths(spark, source.path or "", date, first), "source")
    for name, table in source.join.items():
        rows_df = _join(spark, rows_df, table, f"source.join.{name}")
    return rows_df


def _paths(
    spark: SparkSession, pattern: str, date: datetime.date | None, first: datetime.date | None
) -> list[str]:
    """Return where a day's rows lie; of several days, the places where something lies."""
    if date is None or "{date}" not in pattern:
        return [pattern.replace("{date}", "*")]
    days = [date - datetime.timedelta(days=i) for i in range((date - (first or date)).days + 1)]
    paths = [pattern.replace("{date}", day.isoformat()) for day in reversed(days)]
    # The run's own day must be there; without it the error should name it.
    return [path for path in paths if path == paths[-1] or _is_there(spark, path)]


def _is_there(spark: SparkSession, path: str) -> bool:
    return bool(_found(spark, path)[1])


def _found(spark: SparkSession, path: str) -> tuple[Any, list[Any]]:
    """Return Hadoop's file system of a path or pattern, and the status of each place that fits."""
    context = spark.sparkContext
    assert context._jvm is not None, "a session is active"
    hadoop_path = context._jvm.org.apache.hadoop.fs.Path(path)
    file_system = hadoop_path.getFileSystem(context._jsc.hadoopConfiguration())
    return file_system, list(file_system.globStatus(hadoop_path) or ())


def read_files(spark: SparkSession, settings: Files, paths: list[str], where: str) -> DataFrame:
    """Return the rows of files or folders; `where` names them in an error.

    Columns of a CSV are strings; CORRUPT has the text of a line that does not parse.
    """
    try:
        if settings.format == "delta":
            found = [tables.read_delta(spark, path) for path in paths]
            return functools.reduce(DataFrame.unionByName, found)
        if settings.format == "csv":
            return _read_csv(spark, settings, paths)
        if settings.format == "json":
            inferred = spark.read.json(paths, columnNameOfCorruptRecord=CORRUPT)
            fields = [f for f in inferred.schema.fields if f.name != CORRUPT]
            schema = T.StructType([*fields, T.StructField(CORRUPT, T.StringType())])
            return spark.read.json(paths, schema=schema, columnNameOfCorruptRecord=CORRUPT)
        rows_df = spark.read.parquet(*paths)
        _refuse_empty_files(spark, paths, where)
        return rows_df
    except AnalysisException as error:
        raise LcSparkError(
            f"{where}: cannot read '{', '.join(paths)}' as {settings.format}: {first_line(error)}"
        ) from error


def _refuse_empty_files(spark: SparkSession, paths: list[str], where: str) -> None:
    """Refuse Parquet files of no bytes, as an upload that failed leaves: Spark passes over them."""
    for path in paths:
        file_system, places = _found(spark, path)
        for place in places:
            listed = file_system.listFiles(place.getPath(), True)
            while listed.hasNext():
                status = listed.next()
                name = status.getPath().getName()
                if status.getLen() == 0 and not name.startswith(("_", ".")):  # Spark's own marks
                    raise LcSparkError(
                        f"{where}: {status.getPath()} has 0 bytes, so it is damaged: a Parquet "
                        "file without rows has some. Write it again, or take it out of the folder."
                    )


def _read_csv(spark: SparkSession, settings: Files, paths: list[str]) -> DataFrame:
    # A quote within quotes is written twice (RFC 4180); Spark's default is a backslash before it.
    reader = spark.read.options(sep=settings.delimiter, quote=settings.quote, escape='"')
    names = settings.columns or reader.csv(paths, header=True).columns
    fields = [T.StructField(name, T.StringType()) for name in (*names, CORRUPT)]
    # With pruned columns Spark would not see that a line has too many or too few.
    return reader.option("columnPruning", "false").csv(
        paths,
        header=not settings.columns,
        schema=T.StructType(fields),
        columnNameOfCorruptRecord=CORRUPT,
    )


def _join(spark: SparkSession, rows_df: DataFrame, table: Joined, where: str) -> DataFrame:
    """Add a table's columns to the rows; a row without a match gets nulls."""
    table_df = read_files(spark, table, [table.path], where)
    if CORRUPT not in table_df.columns:
        table_df = table_df.withColumn(CORRUPT, F.lit(None).cast("string"))
    for column in table.keys:
        for whose, df in (("the source", rows_df), (f"'{table.path}'", table_df)):
            if column not in df.columns:
                known = [c for c in df.columns if c != CORRUPT]
                raise LcSparkError(
                    f"{where}: {whose} has no column '{column}' to join on."
                    f"{nearest(column, known)} It has: {', '.join(known)}"
                )
    theirs = [c for c in table_df.columns if c not in table.keys and c != CORRUPT]
    taken = {c.lower() for c in rows_df.columns}
    both = [c for c in theirs if c.lower() in taken]
    if both:
        raise LcSparkError(
            f"{where}: '{table.path}' and the source both have a column '{both[0]}': rename one."
        )
    _check_keys(table_df, table, where)
    good_df = table_df.where(F.col(CORRUPT).isNull()).drop(CORRUPT)
    return rows_df.join(good_df, on=list(table.keys), how="left")


def _check_keys(table_df: DataFrame, table: Joined, where: str) -> None:
    """Refuse a table that has a key twice, which would double rows; tell of unreadable lines."""
    parses = F.col(CORRUPT).isNull()
    keys_df = table_df.groupBy(*[f"`{c}`" for c in table.keys]).agg(
        F.count_if(parses).alias("__rows"), F.count_if(~parses).alias("__unparsed")
    )
    has_key = F.concat(*[F.col(f"`{c}`").isNotNull().cast("string") for c in table.keys])
    twice = (F.col("__rows") > 1) & ~has_key.contains("false")  # a null key meets no row
    row = keys_df.agg(F.sum("__unparsed"), F.count_if(twice)).collect()[0]
    unparsed, n_twice = row[0] or 0, row[1]
    if unparsed:
        log.warning("%s: %d lines of %s do not parse and are left out", where, unparsed, table.path)
    if n_twice:
        raise LcSparkError(
            f"{where}: '{table.path}' has {n_twice} values of {', '.join(table.keys)} in more than "
            "one row, so rows of the source would be doubled: keep one row of each."
        )


def first_line(error: AnalysisException) -> str:
    """Return the first line of Spark's message, which says what; the rest is the plan."""
    return str(error).strip().splitlines()[0]
