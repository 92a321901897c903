"""Turns source rows into Delta ``raw`` by date, and sets unusable rows aside in ``rejected``."""

import datetime
from dataclasses import dataclass

from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from lc_spark import tables
from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.features.prepare import column_types
from lc_spark.field_kinds import Crossed
from lc_spark.sources import CORRUPT, first_line, read_source

NO_DATE = datetime.date(1970, 1, 1)  # the one partition of a log without dates
ADDED = (CORRUPT, "__reason", "__record", "__label", "__date", "__row_id")
OWN = ("row_id", "label", "date")  # columns of ``raw`` that are not the source's


@dataclass(frozen=True)
class Ingested:
    """What an ingest made: source = raw + rejected."""

    source_rows: int
    raw_rows: int
    rejected: dict[str, int]
    raw_version: int


def ingest(spark: SparkSession, config: Config, date: datetime.date | None = None) -> Ingested:
    """Write the rows of one day, or of all days, to ``raw`` and ``rejected``.

    A day's rows replace that day; without a date everything is replaced. ``raw`` has the source's
    columns and row_id (int64), label (float, 0 or 1), date. Raises LcSparkError, before ``raw`` is
    touched, when more than source.max_rejected of the rows are rejected or none is left.
    """
    _check_date(config, date)
    raw_types = {} if date is None else _raw_types(spark, config)
    checked_df = _checked(read_source(spark, config, date), config, date, raw_types)
    condition = None if date is None else tables.date_condition("date", date)
    counts = _counts(checked_df)
    source_rows, good_rows = sum(counts.values()), counts.pop(None, 0)
    rejected = {reason: n for reason, n in counts.items() if reason is not None}
    set_aside_df = checked_df.where(F.col("__reason").isNotNull()).select(
        F.col("__reason").alias("reason"),
        (F.lit(date) if date else F.col("__date")).cast("date").alias("date"),
        F.col("__record").alias("record"),
    )
    # Few rows of any reason: one file, without reading the source in one task.
    tables.write(set_aside_df.repartition(1), config, "rejected", replace_where=condition)
    _check_share(config, source_rows, sum(rejected.values()), rejected)
    good_df = checked_df.where(F.col("__reason").isNull())
    kept = [c for c in checked_df.columns if c not in ADDED and c.lower() not in OWN]
    raw_df = good_df.select(
        *[f"`{c}`" for c in kept],
        F.col("__row_id").alias("row_id"),
        F.col("__label").cast("float").alias("label"),
        F.col("__date").alias("date"),
    )
    # Rows of a day come together first, large days in several tasks: few files a day.
    by_date_df = raw_df.hint("rebalance", "date")
    version = tables.write(by_date_df, config, "raw", ("date",), condition)
    written_df = tables.read(spark, config, "raw", version)
    raw_rows = (written_df if condition is None else written_df.where(condition)).count()
    if raw_rows != good_rows:
        raise LcSparkError(
            f"{good_rows} of {source_rows} source rows were good, but 'raw' got {raw_rows}: the "
            "source changed while it was read. Run the stage again."
        )
    return Ingested(source_rows, raw_rows, rejected, version)


def _check_date(config: Config, date: datetime.date | None) -> None:
    if date is not None and config.source.date is None:
        raise LcSparkError(
            f"To ingest one day ({date}), source.date must say which column or SQL expression "
            "holds a row's day."
        )


def _raw_types(spark: SparkSession, config: Config) -> dict[str, str]:
    """Return column -> SQL type of the days that are in ``raw``, which another day must fit."""
    if not tables.exists(spark, config, "raw"):
        return {}
    fields = tables.read(spark, config, "raw").schema.fields
    return {f.name: f.dataType.simpleString() for f in fields if f.name not in OWN}


def _checked(
    source_df: DataFrame, config: Config, date: datetime.date | None, raw_types: dict[str, str]
) -> DataFrame:
    """Add __reason (null for a usable row), __record, __label, __date, __row_id; cast columns."""
    if CORRUPT not in source_df.columns:
        source_df = source_df.withColumn(CORRUPT, F.lit(None).cast("string"))
    try:
        cast_df = _cast(source_df, _wanted_types(source_df, config, raw_types))
    except AnalysisException as error:
        raise LcSparkError(f"source.types cannot be applied: {first_line(error)}") from error
    cast_df = _derive(cast_df, config)
    column_types(cast_df, config.fields)  # a field that the table lacks, or of a wrong type
    _check_own_columns(config)
    own = [c for c in source_df.columns if c != CORRUPT]
    label = F.expr(config.label)
    as_boolean = label.cast("string").try_cast("boolean").cast("double")  # a text "true"
    try:
        checked_df = cast_df.select(
            *[f"`{c}`" for c in cast_df.columns],
            F.coalesce(label.cast("double"), as_boolean).alias("__label"),
            _date_column(config).alias("__date"),
            _row_id_column(config, own).alias("__row_id"),
            F.coalesce(
                F.col("__unfit"),
                *[F.when(F.expr(when), reason) for reason, when in config.source.reject.items()],
            ).alias("__rejected"),
        )
    except AnalysisException as error:
        raise LcSparkError(
            "label, source.date, source.row_id or source.reject cannot be evaluated: "
            f"{first_line(error)}"
        ) from error
    if date is not None and "{date}" not in (config.source.path or ""):
        checked_df = checked_df.where(F.col("__date").isNull() | (F.col("__date") == F.lit(date)))
    found = F.col("__label")
    return checked_df.withColumn(
        "__reason",
        F.coalesce(
            F.col("__rejected"),
            F.when(F.col("__date").isNull(), "no date"),
            F.when(F.col("__date") != F.lit(date), "date of another day") if date else F.lit(None),
            F.when(found.isNull() | F.isnan(found), "no label"),
            F.when(~found.isin(0.0, 1.0), "label is not 0 or 1"),
        ),
    ).drop("__unfit", "__rejected")


def _cast(source_df: DataFrame, wanted: dict[str, str]) -> DataFrame:
    """Cast columns; add __unfit (what does not fit, else null) and __record (the row as read)."""
    own = [c for c in source_df.columns if c != CORRUPT]
    cast = {c: F.col(f"`{c}`").try_cast(t) for c, t in wanted.items()}
    unfit = [
        F.when(F.col(f"`{c}`").isNotNull() & cast[c].isNull(), f"column {c} is not {t}")
        for c, t in wanted.items()
    ]
    # Spark reads a corrupt column only beside others, and prunes what nobody asks for: keep both.
    return source_df.select(
        *[cast.get(c, F.col(f"`{c}`")).alias(c) for c in own],
        F.col(CORRUPT),
        F.coalesce(F.when(F.col(CORRUPT).isNotNull(), "the line does not parse"), *unfit).alias(
            "__unfit"
        ),
        F.coalesce(F.col(CORRUPT), F.to_json(F.struct(*[f"`{c}`" for c in own]))).alias("__record"),
    )


def _derive(cast_df: DataFrame, config: Config) -> DataFrame:
    """Add the columns of source.derive, made of the columns as read and cast."""
    taken = {c.lower(): c for c in cast_df.columns}
    for name in config.source.derive:
        if name.lower() in taken:
            raise LcSparkError(
                f"source.derive makes '{name}', but the source has '{taken[name.lower()]}' "
                "already: give the new column another name."
            )
    try:
        return cast_df.withColumns({c: F.expr(sql) for c, sql in config.source.derive.items()})
    except AnalysisException as error:
        raise LcSparkError(f"source.derive cannot be evaluated: {first_line(error)}") from error


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


def _wanted_types(
    source_df: DataFrame, config: Config, raw_types: dict[str, str]
) -> dict[str, str]:
    """Return the SQL type of the columns to cast: given, as in ``raw``, or numbers as text."""
    schema = source_df.schema
    wanted = {
        c.name: raw_types[c.name]
        for c in schema.fields
        if raw_types.get(c.name, c.dataType.simpleString()) != c.dataType.simpleString()
    }
    wanted |= config.source.types
    unknown = [c for c in wanted if c not in schema.names]
    if unknown:
        raise LcSparkError(
            f"source.types names '{unknown[0]}', which the table lacks. It has: "
            f"{', '.join(c for c in schema.names if c != CORRUPT)}"
        )
    for field in config.fields:
        if field.kind in ("bucketed", "continuous") and field.column in schema.names:
            text = isinstance(schema[field.column].dataType, T.StringType)
            if text and field.column not in wanted:
                wanted[field.column] = "double"
    return wanted


def _date_column(config: Config) -> Column:
    if config.source.date is None:
        return F.lit(NO_DATE)
    return F.expr(f"try_cast({config.source.date} AS DATE)")


def _row_id_column(config: Config, own: list[str]) -> Column:
    columns = config.source.row_id or tuple(own)
    # As text with the place of nulls: xxhash64 skips nulls, so (a, null) and (null, a) would meet.
    return F.xxhash64(*[F.coalesce(F.col(f"`{c}`").cast("string"), F.lit("\0")) for c in columns])


def _counts(checked_df: DataFrame) -> dict[str | None, int]:
    """Return the rows by reason, the most frequent first; None counts the usable rows.

    A pass of its own: an Observation on the pass that writes would cost less, but from then on the
    session cannot apply an MLlib model (Spark 4.0 then fails to serialise its ObservationManager).
    """
    counted = checked_df.groupBy("__reason").count().orderBy(F.desc("count"), "__reason").collect()
    return {row["__reason"]: int(row["count"]) for row in counted}


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
