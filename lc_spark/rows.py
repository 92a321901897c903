"""Turns source rows into typed rows with their day and row id, or the reason why they cannot be.

Ingest and scoring share it, so that a row scored before its label exists has the id that it will
have in ``raw``.
"""

import datetime
import re
from collections.abc import Collection, Mapping

from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from lc_spark import tables
from lc_spark.config import Config
from lc_spark.errors import LcSparkError, nearest
from lc_spark.sources import CORRUPT, first_line, read_source

NO_DATE = datetime.date(1970, 1, 1)  # the one partition of a log without dates
OWN = ("row_id", "label", "date")  # columns of ``raw`` that are not the source's
ADDED = (CORRUPT, "__unfit", "__misdated", "__record", "__date", "__row_id")


def parsed_df(
    source_df: DataFrame,
    config: Config,
    date: datetime.date | None,
    types: Mapping[str, str],
    must_fit: Collection[str],
    derive: Mapping[str, str],
    first: datetime.date | None = None,
) -> DataFrame:
    """Cast columns to types, add those of derive and ADDED; drop rows of another day.

    With `first` the days from it to date are wanted.

    __record is the row as read; __unfit says why a row does not parse, __misdated why it is not of
    this day, both null for a good row. A value that is not of its type spoils the row where the
    column must fit, and is null elsewhere. Raises LcSparkError when a setting cannot be applied.
    """
    if CORRUPT not in source_df.columns:
        source_df = source_df.withColumn(CORRUPT, F.lit(None).cast("string"))
    own = [c for c in source_df.columns if c != CORRUPT]
    try:
        cast_df = _cast(source_df, types, must_fit)
    except AnalysisException as error:
        raise LcSparkError(f"source.types cannot be applied: {first_line(error)}") from error
    derived_df = _derive(cast_df, derive)
    try:
        dated_df = derived_df.select(
            *[f"`{c}`" for c in derived_df.columns],
            _date_column(config).alias("__date"),
            _row_id_column(config, own).alias("__row_id"),
        )
    except AnalysisException as error:
        raise LcSparkError(
            f"source.date or source.row_id cannot be evaluated: {first_line(error)}"
        ) from error
    found = F.col("__date")
    if first is not None or (date is not None and "{date}" not in (config.source.path or "")):
        wanted = found.between(F.lit(first or date), F.lit(date))
        dated_df = dated_df.where(found.isNull() | wanted)
    another_day = found != F.lit(date) if date and first is None else F.lit(False)
    misdated = F.when(found.isNull(), "no date").when(another_day, "date of another day")
    return dated_df.withColumn("__misdated", misdated)


def like_raw_df(rows_df: DataFrame, *more: Column) -> DataFrame:
    """Return rows of parsed_df as ``raw`` has them: the source's columns, row_id, ..., date."""
    kept = [c for c in rows_df.columns if c not in ADDED and c.lower() not in OWN]
    return rows_df.select(
        *[f"`{c}`" for c in kept],
        F.col("__row_id").alias("row_id"),
        *more,
        F.col("__date").alias("date"),
    )


def wanted_types(
    source_df: DataFrame, config: Config, raw_types: Mapping[str, str]
) -> dict[str, str]:
    """Return the SQL type of the columns to cast: given, as in ``raw``, or numbers as text."""
    schema = source_df.schema
    wanted = {
        c.name: raw_types[c.name]
        for c in schema.fields
        if raw_types.get(c.name, c.dataType.simpleString()) != c.dataType.simpleString()
    }
    wanted |= config.source.types
    for field in config.fields:
        if field.kind in ("bucketed", "continuous") and field.column in schema.names:
            text = isinstance(schema[field.column].dataType, T.StringType)
            if text and field.column not in wanted:
                wanted[field.column] = "double"
    return wanted


def raw_types(spark: SparkSession, config: Config) -> dict[str, str]:
    """Return column -> SQL type of the days that are in ``raw``, which another day must fit."""
    if not tables.exists(spark, config, "raw"):
        return {}
    fields = tables.read(spark, config, "raw").schema.fields
    return {f.name: f.dataType.simpleString() for f in fields if f.name not in OWN}


def unlabelled_df(
    spark: SparkSession, config: Config, date: datetime.date, columns: Mapping[str, str]
) -> DataFrame:
    """Return the source's rows of a day as ``raw`` will have them, before there is a label.

    columns: raw column -> SQL type that a model reads; what else the source lacks, as the columns
    that the label is made of, is not missed. A column __aside says why a row cannot be scored
    (null: it can). Raises LcSparkError when the source lacks one of the columns.
    """
    check_date(config, date, "score")
    source_df = read_source(spark, config, date)
    present = {c.name: c.dataType.simpleString() for c in source_df.schema.fields}
    wanted = wanted_types(source_df, config, raw_types(spark, config)) | {
        c: t for c, t in columns.items() if c not in OWN and present.get(c, t) != t
    }
    types = {c: t for c, t in wanted.items() if c in present}
    words = set(re.findall(r"\w+", config.source.date or ""))
    needed = {*columns, *config.source.row_id, *words}
    derive = {c: sql for c, sql in config.source.derive.items() if c in needed}
    parsed = parsed_df(source_df, config, date, types, columns, derive)
    rows_df = like_raw_df(parsed, F.coalesce("__unfit", "__misdated").alias("__aside"))
    for column in columns:
        if column not in rows_df.columns:
            known = [c for c in present if c != CORRUPT]
            raise LcSparkError(
                f"The model reads column '{column}', which the source lacks on {date}."
                f"{nearest(column, known)} It has: {', '.join(known)}"
            )
    return rows_df


def check_date(config: Config, date: datetime.date | None, to_do: str) -> None:
    """Refuse the work on one day where no row tells its day."""
    if date is not None and config.source.date is None:
        raise LcSparkError(
            f"To {to_do} one day ({date}), source.date must say which column or SQL expression "
            "holds a row's day."
        )


def _cast(source_df: DataFrame, types: Mapping[str, str], must_fit: Collection[str]) -> DataFrame:
    own = [c for c in source_df.columns if c != CORRUPT]
    cast = {c: F.col(f"`{c}`").try_cast(t) for c, t in types.items()}
    unfit = [
        F.when(F.col(f"`{c}`").isNotNull() & cast[c].isNull(), f"column {c} is not {t}")
        for c, t in types.items()
        if c in must_fit
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


def _derive(cast_df: DataFrame, derive: Mapping[str, str]) -> DataFrame:
    """Add the columns of source.derive, made of the columns as read and cast."""
    taken = {c.lower(): c for c in cast_df.columns}
    for name in derive:
        if name.lower() in taken:
            raise LcSparkError(
                f"source.derive makes '{name}', but the source has '{taken[name.lower()]}' "
                "already: give the new column another name."
            )
    try:
        return cast_df.withColumns({c: F.expr(sql) for c, sql in derive.items()})
    except AnalysisException as error:
        raise LcSparkError(f"source.derive cannot be evaluated: {first_line(error)}") from error


def _date_column(config: Config) -> Column:
    if config.source.date is None:
        return F.lit(NO_DATE)
    return F.expr(f"try_cast({config.source.date} AS DATE)")


def _row_id_column(config: Config, own: list[str]) -> Column:
    columns = config.source.row_id or tuple(own)
    # As text with the place of nulls: xxhash64 skips nulls, so (a, null) and (null, a) would meet.
    return F.xxhash64(*[F.coalesce(F.col(f"`{c}`").cast("string"), F.lit("\0")) for c in columns])
