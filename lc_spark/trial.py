"""Counts the rows of the source, draws a sample of them, and times the stages' own work on it."""

import contextlib
import dataclasses
import datetime
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from lc_spark import files, ingest, resources, rows, session, tables
from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.features.fit import fit_features
from lc_spark.features.levels import write_levels
from lc_spark.features.shards import write_shards
from lc_spark.features.sizes import PlannedFields, plan_fields
from lc_spark.features.vectors import shard_vectors
from lc_spark.field_map import FieldMap
from lc_spark.sources import read_source
from lc_spark.training import lr, lr_choice

log = logging.getLogger("lc_spark")

SAMPLE_ROWS = 200_000
SAMPLE_CELLS = 20_000_000  # rows times fields
PART = 0.25  # of the sample: the time for a part and for all tells seconds from seconds a row
LEAST = 2000  # rows of which a part would be too few for any split
LR_PASSES = 3


@dataclass(frozen=True)
class Line:
    """Seconds of a piece of work as a line over rows."""

    fixed: float
    a_row: float

    def at(self, n_rows: float) -> float:
        """Return the seconds for so many rows."""
        return self.fixed + self.a_row * n_rows


@dataclass(frozen=True)
class MllibTrial:
    """What was measured of LR by MLlib, by train rows."""

    vectors: Line
    lr_pass: Line  # one pass of L-BFGS
    vector_bytes: float


@dataclass(frozen=True)
class Trial:
    """What was counted exactly (rows), estimated (fields) and measured on the sample."""

    source_rows: int
    rejected: dict[str, int]
    split_rows: dict[str, int]
    fields: PlannedFields
    count_seconds: float  # of a pass over the source that reads what label, split and rejects need
    read_seconds: float  # of a pass that reads all columns
    write: Line  # raw, by rows of all splits
    features: Line
    bytes_a_row: dict[str, float]  # of raw, shards
    timed_rows: int
    mllib: MllibTrial | None  # None: torch will fit LR


def run_trial(spark: SparkSession, config: Config, sample_rows: int = SAMPLE_ROWS) -> Trial:
    """Count, sample and time; leaves nothing in the workspace.

    Raises LcSparkError in the words of ingest where the source cannot be read or lacks a column,
    and when a split has no rows.
    """
    if config.split.by == "window":
        ingest.run_day(config)
    started = time.perf_counter()
    marked_df = _marked(spark, config)
    counted = marked_df.groupBy("__reason", "split").count().collect()
    count_seconds = time.perf_counter() - started
    rejected: dict[str, int] = {}
    split_rows = dict.fromkeys(("train", "valid", "test"), 0)
    for row in counted:
        if row["__reason"] is None:
            split_rows[row["split"]] += row["count"]
        else:
            rejected[row["__reason"]] = rejected.get(row["__reason"], 0) + row["count"]
    good_rows = sum(split_rows.values())
    log.info("plan: %s usable rows counted (%.0f s)", f"{good_rows:,}", count_seconds)
    if good_rows == 0:
        raise LcSparkError(
            f"The source has no usable rows (for this date): {sum(rejected.values())} rejected."
        )
    for split, n in split_rows.items():
        if n == 0:
            raise LcSparkError(f"The {split} split has no rows: check 'split' in the config.")
    share = min(sample_rows, SAMPLE_CELLS // len(config.fields)) / good_rows
    # Drawn before it is checked: else every column of every row would be made for nothing.
    drawn_df = marked_df if share >= 1 else _marked(spark, config, share)
    sample_df = drawn_df.where(F.col("__reason").isNull()).drop("__reason")
    with _workspace(config) as there:
        sample_df = sample_df.persist(StorageLevel.DISK_ONLY)
        started = time.perf_counter()
        n_sample = sample_df.count()
        read_seconds = time.perf_counter() - started
        log.info("plan: %s of them drawn (%.0f s)", f"{n_sample:,}", read_seconds)
        started = time.perf_counter()
        train_df = sample_df.where(F.col("split") == "train")
        fields = plan_fields(train_df, config.fields, split_rows["train"])
        d, seconds = fields.field_map.d, time.perf_counter() - started
        log.info("plan: about %s features estimated (%.0f s)", f"{d:,}", seconds)
        started = time.perf_counter()
        shares = (PART, PART, 1.0) if n_sample >= LEAST else (1.0, 1.0, 1.0)
        measured = _time_stages(spark, there, sample_df.drop("split"), shares, fields)
        log.info("plan: stages timed on them (%.0f s)", time.perf_counter() - started)
        sample_df.unpersist()
    n_source = good_rows + sum(rejected.values())
    return Trial(n_source, rejected, split_rows, fields, count_seconds, read_seconds, *measured)


def _marked(spark: SparkSession, config: Config, share: float | None = None) -> DataFrame:
    """Return the rows that a run would ingest, as ``raw`` has them, with __reason and split.

    Of a share of them, drawn by chance, where one is given.
    """
    day, first = config.day, None
    if config.split.by == "window":
        first = ingest.run_day(config) - datetime.timedelta(days=config.split.days - 1)
    rows.check_date(config, day, "plan")
    types = {} if day is None else rows.raw_types(spark, config)
    source_df = read_source(spark, config, day, first)
    if share is not None:
        source_df = source_df.sample(share, config.seed)
    checked_df = ingest.checked(source_df, config, day, types, first)
    label = F.col("__label").cast("float").alias("label")
    raw_df = rows.like_raw_df(checked_df, label).drop("__label")
    return raw_df.withColumn("split", ingest.split_column(config))


@contextlib.contextmanager
def _workspace(config: Config) -> Iterator[Config]:
    """Give the config with a folder of the workspace for its own, and remove it."""
    folder = f"{config.workspace}/plan"
    files.remove(files.as_path(folder))  # of a plan that was killed
    try:
        yield config.model_copy(update={"workspace": folder})
    finally:
        files.remove(files.as_path(folder))


def _time_stages(
    spark: SparkSession,
    there: Config,
    sample_df: DataFrame,
    shares: Sequence[float],
    fields: PlannedFields,
) -> tuple[Line, Line, dict[str, float], int, MllibTrial | None]:
    """Time what the stages do on shares of the sample, in a workspace of its own.

    The first time counts for nothing: Java compiles, workers start.
    """
    raw, written, made = files.uri(there.workspace_path / "sample"), [], []
    for share in shares:
        part_df = sample_df if share == 1 else sample_df.sample(share, there.seed)
        started = time.perf_counter()
        part_df.write.mode("overwrite").parquet(raw)
        seconds = time.perf_counter() - started
        raw_df = tables.with_places(spark.read.parquet(raw))
        n = raw_df.count()
        written.append((seconds, n))
        started = time.perf_counter()
        train_df = raw_df.where(ingest.split_column(there) == "train")
        fitted = fit_features(train_df, there.fields, there.seed)
        write_levels(spark, fitted.levels, there)
        write_shards(raw_df, fitted.field_map, fitted.vocabulary, there, 0)
        made.append((time.perf_counter() - started, n))
    write, features = (line_through(*times[1], *times[2]) for times in (written, made))
    bytes_a_row = {
        "raw": resources.folder_bytes(there.workspace_path / "sample") / n,
        "shards": resources.folder_bytes(there.run_path / "shards") / n,
    }
    heap, tasks = session.heap_and_tasks(spark)
    if lr_choice.fitted_by(there.lr, fields.field_map.d, tasks, heap) == "torch":
        return write, features, bytes_a_row, n, None
    sizes = zip(fitted.field_map.fields, fields.field_map.fields, strict=True)
    grown = [dataclasses.replace(i, size=max(i.size, planned.size)) for i, planned in sizes]
    mllib = _time_mllib(spark, there, FieldMap(tuple(grown)))
    return write, features, bytes_a_row, n, mllib


def _time_mllib(spark: SparkSession, there: Config, field_map: FieldMap) -> MllibTrial:
    """Time MLlib's LR over as many features as are planned: a pass has a part that grows with d."""
    folder = there.run_path / "vectors"
    started = time.perf_counter()
    train_df = shard_vectors(spark, there, field_map, "train", files.uri(folder))
    n_train = train_df.count()
    vectors = Line(0.0, (time.perf_counter() - started) / n_train)
    few = there.model_copy(update={"lr": there.lr.model_copy(update={"max_iterations": LR_PASSES})})
    times = []
    for df in (train_df.sample(PART, there.seed), train_df):
        df = df.persist(StorageLevel.MEMORY_AND_DISK)
        n_fit = df.count()
        fit, _ = lr.fit_lr(df, few, max(there.lr.l2))
        times.append((fit.seconds / (fit.iterations + 1), n_fit))
        df.unpersist()
    vector_bytes = resources.folder_bytes(folder) / n_train
    return MllibTrial(vectors, line_through(*times[0], *times[1]), vector_bytes)


def line_through(seconds: float, n: int, more_seconds: float, more: int) -> Line:
    """Return the line through two measurements; a busy machine makes none of it negative."""
    if n == more:  # too few rows to take a part of them
        return Line(more_seconds, 0.0)
    slope = max(0.0, more_seconds - seconds) / (more - n)
    slope = min(slope, more_seconds / more)
    return Line(more_seconds - slope * more, slope)
