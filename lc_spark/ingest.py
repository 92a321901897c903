"""Turns source rows into Delta ``raw`` by date, and sets unusable rows aside in ``rejected``."""

import datetime
from dataclasses import dataclass

from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from lc_spark import rows, tables
from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.features.prepare import column_types
from lc_spark.field_kinds import Crossed
from lc_spark.rows import OWN
from lc_spark.sources import CORRUPT, first_line, read_source

# Up to so many files a day, about, or with so many rows a file, ``raw`` is written as rows come.
FILES_A_DAY, FILE_ROWS = 2, 65_536


@dataclass(frozen=True)
class Ingested:
    """What an ingest made: source = raw + rejected."""

    source_rows: int
    raw_rows: int
    rejected: dict[str, int]
    raw_version: int


def ingest(
    spark: SparkSession,
    config: Config,
    date: datetime.date | None = None,
    first: datetime.date | None = None,
) -> Ingested:
    """Write the rows of one day, of the days from first to date, or of all, to raw and rejected.

    A day's rows replace that day; without a date everything is replaced. ``raw`` has the source's
    columns and row_id (int64), label (float, 0 or 1), date. Raises LcSparkError, before ``raw`` is
    touched, when more than source.max_rejected of the rows are rejected or none is left.
    """
    rows.check_date(config, date, "ingest")
    raw_types = {} if date is None else rows.raw_types(spark, config)
    checked_df = checked(read_source(spark, config, date, first), config, date, raw_types, first)
    condition = None if date is None else tables.date_condition("date", date, first)
    counts, few_files = _counts(checked_df)
    source_rows, good_rows = sum(counts.values()), counts.pop(None, 0)
    rejected = {reason: n for reason, n in counts.items() if reason is not None}
    # Without any the source need not be read once more.
    set_aside = F.col("__reason").isNotNull() if rejected else F.lit(False)
    set_aside_df = checked_df.where(set_aside).select(
        F.col("__reason").alias("reason"),
        (F.lit(date) if date and first is None else F.coalesce("__date", F.lit(date)))
        .cast("date")
        .alias("date"),
        F.col("__record").alias("record"),
    )
    # Few rows of any reason: one file, without reading the source in one task.
    tables.write(set_aside_df.repartition(1), config, "rejected", replace_where=condition)
    _check_share(config, source_rows, sum(rejected.values()), rejected)
    good_df = checked_df.where(F.col("__reason").isNull())
    label = F.col("__label").cast("float").alias("label")
    raw_df = rows.like_raw_df(good_df, label).drop("__label", "__reason")
    if not few_files:  # rows of a day come together first, large days in several tasks
        raw_df = raw_df.hint("rebalance", "date")
    version = tables.write(raw_df, config, "raw", ("date",), condition)
    written_df = tables.read(spark, config, "raw", version)
    raw_rows = (written_df if condition is None else written_df.where(condition)).count()
    if raw_rows != good_rows:
        raise LcSparkError(
            f"{good_rows} of {source_rows} source rows were good, but 'raw' got {raw_rows}: the "
            "source changed while it was read. Run the stage again."
        )
    return Ingested(source_rows, raw_rows, rejected, version)


def checked(
    source_df: DataFrame,
    config: Config,
    date: datetime.date | None,
    raw_types: dict[str, str],
    first: datetime.date | None,
) -> DataFrame:
    """Add __reason (null for a usable row) and __label to what ``rows.parsed_df`` adds."""
    types = rows.wanted_types(source_df, config, raw_types)
    unknown = [c for c in types if c not in source_df.columns]
    if unknown:
        raise LcSparkError(
            f"source.types names '{unknown[0]}', which the table lacks. It has: "
            f"{', '.join(c for c in source_df.columns if c != CORRUPT)}"
        )
    derive = config.source.derive
    parsed_df = rows.parsed_df(source_df, config, date, types, types, derive, first)
    column_types(parsed_df, config.fields)  # a field that the table lacks, or of a wrong type
    _check_own_columns(config)
    label = F.expr(config.label)
    as_boolean = label.cast("string").try_cast("boolean").cast("double")  # a text "true"
    rejects = [F.when(F.expr(when), reason) for reason, when in config.source.reject.items()]
    try:
        labelled_df = parsed_df.select(
            *[f"`{c}`" for c in parsed_df.columns],
            F.coalesce(label.cast("double"), as_boolean).alias("__label"),
            F.coalesce(F.lit(None).cast("string"), *rejects).alias("__rejected"),
        )
    except AnalysisException as error:
        raise LcSparkError(
            f"label or source.reject cannot be evaluated: {first_line(error)}"
        ) from error
    found = F.col("__label")
    return labelled_df.withColumn(
        "__reason",
        F.coalesce(
            "__unfit",
            "__rejected",
            "__misdated",
            F.when(found.isNull() | F.isnan(found), "no label"),
            F.when(~found.isin(0.0, 1.0), "label is not 0 or 1"),
        ),
    ).drop("__rejected")


def _check_own_columns(config: Config) -> None:
    """Refuse a field that would read label, row_id or date of ``raw`` for a column of its own."""
    for field in config.fields:
        if isinstance(field, Crossed) or field.column.lower() not in OWN:
            continue
        if field.column.lower() != "date" or (config.source.date or "").lower() != "date":
            raise LcSparkError(
                f"Field '{field.name}' reads column '{field.column}', a name that the table 'raw' "
                f"keeps for its own ({', '.join(OWN)}): rename the column in the source."
            )


def _counts(checked_df: DataFrame) -> tuple[dict[str | None, int], bool]:
    """Return the rows by reason, the most frequent first; None counts the usable rows.

    And whether the partitions, written as they are, make few files, or large ones: as they do
    where the source lies about in the order of its days. To bring each day together first costs as
    much again as to write all.

    A pass of its own: an Observation on the pass that writes would cost less, but from then on the
    session cannot apply an MLlib model (Spark 4.0 then fails to serialise its ObservationManager).
    """
    pieces_df = (
        checked_df.withColumn("__piece", F.spark_partition_id())
        .groupBy("__reason", "__date", "__piece")
        .agg(F.count("*").alias("n"))
    )
    counted = (
        pieces_df.groupBy("__reason")
        .agg(
            F.sum("n").alias("n"),
            F.count("*").alias("files"),
            F.count_distinct("__date").alias("days"),
            F.count_distinct("__piece").alias("pieces"),
        )
        .orderBy(F.desc("n"), "__reason")
        .collect()
    )
    good = [row for row in counted if row["__reason"] is None]
    few_files = all(
        row["files"] <= max(FILES_A_DAY * row["days"] + row["pieces"], row["n"] // FILE_ROWS)
        for row in good
    )
    return {row["__reason"]: int(row["n"]) for row in counted}, few_files


def _check_share(config: Config, rows: int, n_rejected: int, rejected: dict[str, int]) -> None:
    reasons = ", ".join(f"{reason}: {n}" for reason, n in rejected.items()) or "none"
    if rows == 0:
        raise LcSparkError("The source has no rows (for this date): nothing was changed in 'raw'.")
    if n_rejected > config.source.max_rejected * rows or n_rejected == rows:
        raise LcSparkError(
            f"{n_rejected} of {rows} rows were rejected ({reasons}), more than source.max_rejected "
            f"= {config.source.max_rejected}. They are in {tables.path_of(config, 'rejected')}; "
            "'raw' was not changed."
        )


def days_to_load(spark: SparkSession, config: Config) -> datetime.date | None:
    """Return the first day that a run by window ingests: its own, or all of the window at first."""
    if config.split.by != "window":
        return None
    if tables.exists(spark, config, "raw"):
        return None
    return run_day(config) - datetime.timedelta(days=config.split.days - 1)


def missing_days(spark: SparkSession, config: Config) -> list[str]:
    """Return the days of a run's window that ``raw`` has no rows of."""
    if config.split.by != "window":
        return []
    raw_df = rows_of_run(tables.read(spark, config, "raw"), config)
    found = {row[0] for row in raw_df.select("date").distinct().collect()}
    days = [run_day(config) - datetime.timedelta(days=i) for i in range(config.split.days)]
    return sorted(str(day) for day in days if day not in found)


def rows_of_run(raw_df: DataFrame, config: Config) -> DataFrame:
    """Return the rows of ``raw`` that a run sees: with a split by window those of its days."""
    if config.split.by != "window":
        return raw_df
    last = run_day(config)
    first = last - datetime.timedelta(days=config.split.days - 1)
    return raw_df.where(F.col("date").between(F.lit(first), F.lit(last)))


def run_day(config: Config) -> datetime.date:
    """Return the day of the run; raises LcSparkError where there is none."""
    if config.day is None:
        raise LcSparkError("A split by window is of one day's run: give --date.")
    return config.day


def split_column(config: Config) -> Column:
    """Return train, valid or test for a row of ``raw``, by the config's split."""
    split = config.split
    if split.by == "date":
        return (
            F.when(F.col("date") < F.lit(split.valid_from), "train")
            .when(F.col("date") < F.lit(split.test_from), "valid")
            .otherwise("test")
        )
    share = F.pmod(F.xxhash64(F.lit(f"split {config.seed}"), "row_id"), F.lit(1_000_000)) / 1e6
    return (
        F.when(share < split.test, "test")
        .when(share < split.test + split.valid, "valid")
        .otherwise("train")
    )
