"""Scores every system on the same test rows; writes tables, figures, report; registers the best."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from lc_spark import facts, figures, files, metrics, registry, report, tables, tracking
from lc_spark.config import Config
from lc_spark.errors import LcSparkError, nearest
from lc_spark.evaluation_report import Evaluated, base_content, parameters_of, run_content
from lc_spark.facts import Facts
from lc_spark.features import drift
from lc_spark.field_map import FieldMap
from lc_spark.ingest import run_day
from lc_spark.metrics import Metrics
from lc_spark.score import shard_scores_df
from lc_spark.systems import System
from lc_spark.tracking import StageRun
from lc_spark.training import models

EARLIER_STAGES = ("ingest", "features", "train_lr", "train_lc")
ROC_BUCKETS = 200
LOGGED = ("auc", "logloss", "ne", "calibration", "group_auc", "parameters", "seconds_per_epoch")
RESULT_SCHEMA = {
    "system": "string",
    "auc": "double",
    "logloss": "double",
    "ne": "double",
    "calibration": "double",
    "group_auc": "double",
    "valid_logloss": "double",
    "parameters": "long",
    "seconds_per_epoch": "double",
    "train_rows": "long",
    "test_rows": "long",
    "run_id": "string",
}


def evaluate_stage(spark: SparkSession, config: Config, parent: str) -> Facts:
    """Test shards and models -> Delta test_scores and evaluation, report, registered winner."""
    with tracking.stage(config, parent, "evaluate") as run:
        return evaluate_systems(spark, config, run)


def evaluate_systems(spark: SparkSession, config: Config, run: StageRun) -> Facts:
    """Evaluate all systems of the config; return the stage's facts, results among them.

    The system with the lowest validation log loss is registered: test rows choose nothing.
    """
    field_map = FieldMap.read(config.run_path / "field_map.json")
    done = {name: facts.read(config, name) for name in EARLIER_STAGES}
    test_df = all_scores_df(spark, config, field_map, "test")
    version = tables.write(test_df, config, "test_scores", ("system",))
    scores_df = tables.read(spark, config, "test_scores", version)
    evaluated = evaluate_scores(spark, config, field_map, scores_df)
    for one in evaluated:
        numbers = one.metrics.as_floats() | {"valid_logloss": one.valid_logloss}
        run.log_metrics({f"{one.system.name}.{key}": value for key, value in numbers.items()})
    results = [_result(config, field_map, one, done) for one in evaluated]
    for result in results:
        numbers = {k: result[k] for k in LOGGED if result[k] is not None}
        tracking.append_to(run.uri, result["run_id"]).log_metrics(
            {f"test_{key}": float(value) for key, value in numbers.items()}
        )
    best = min(evaluated, key=lambda one: one.valid_logloss)
    table_version = _write_evaluation(spark, config, field_map, results, evaluated)
    run.set_tags(
        {
            "evaluation_version": str(table_version),
            "test_scores_version": str(version),
            "fingerprint": field_map.fingerprint,
            "winner": best.system.name,
        }
    )
    served = served_quality(spark, config)
    if served is not None:
        run.log_metrics({f"served_{key}": value for key, value in served.as_floats().items()})
    base = base_content(spark, config, field_map, done)
    reachable = best_reachable(config, scores_df)
    content = run_content(base, config, field_map, results, evaluated, done, reachable)
    run.log_figure(figures.roc(content.roc), "roc.svg")
    run.log_figure(figures.calibration(content.calibration), "calibration.svg")
    page = report.write_report(config, content)
    run.log_text(page.read_text(encoding="utf-8"), "report.html")
    numbers = best.metrics.as_floats() | {"valid_logloss": best.valid_logloss}
    with tempfile.TemporaryDirectory() as bundle:
        make_bundle(config, best.system, Path(bundle))
        model_version = registry.register(config, run, Path(bundle), best.system.name, numbers)
    model_uri = f"models:/{config.model_name}/{model_version}"
    return {
        "results": results,
        "best": content.best,
        "report": str(page),
        "registered": model_uri,
        "served": None if served is None else dataclasses.asdict(served),
        "run_id": run.run_id,
        "summary": (f"scores served for the day: AUC {served.auc:.4f}; " if served else "")
        + f"{len(results)} systems on {best.metrics.rows:,} test rows; "
        f"{best.system.name} has the lowest validation log loss and is {model_uri}",
    }


def served_quality(spark: SparkSession, config: Config) -> Metrics | None:
    """Return the metrics of the scores that were written for the run's day before its labels came.

    None where there are none, or where the day's rows are of one label.
    """
    if config.split.by != "window" or not tables.exists(spark, config, "scores"):
        return None
    day = tables.date_condition("date", run_day(config))
    scores_df = tables.read(spark, config, "scores").where(day).select("row_id", "score")
    labels_df = tables.read(spark, config, "raw").where(day).select("row_id", "label")
    # Equal rows share an id.
    both_df = labels_df.join(scores_df.dropDuplicates(["row_id"]), "row_id").persist()
    labels = both_df.select("label").distinct().count()
    found = metrics.evaluate(both_df) if labels == 2 else None
    both_df.unpersist()
    return found


def all_scores_df(
    spark: SparkSession, config: Config, field_map: FieldMap, split: str
) -> DataFrame:
    """Return (system, row_id, label, score[, group][, truth]) of every system on one split."""
    wanted = {"group": (config.evaluation.group, "string")}
    wanted["truth"] = (config.evaluation.truth, "double")
    named = {key: pair for key, pair in wanted.items() if pair[0] is not None}
    folders = {
        system.name: config.run_path / "models" / model_folder(system) for system in config.systems
    }
    scores_df = shard_scores_df(spark, config, field_map, folders, split)
    if not named:
        return scores_df
    raw_df = tables.read(spark, config, "raw")
    for key, (column, _) in named.items():
        if column not in raw_df.columns:
            raise LcSparkError(
                f"evaluation.{key} is '{column}', which the table lacks."
                f"{nearest(str(column), raw_df.columns)} It has: {', '.join(raw_df.columns)}"
            )
    beside = [F.col(f"`{column}`").cast(type_).alias(k) for k, (column, type_) in named.items()]
    # Equal rows share an id, and so what stands beside it.
    beside_df = raw_df.select("row_id", *beside).dropDuplicates(["row_id"])
    return scores_df.join(beside_df, "row_id", how="left")


def model_folder(system: System) -> str:
    """Return the name of the folder under models/ that holds a system."""
    return "lr" if system.system == "lr" else system.name


def evaluate_scores(
    spark: SparkSession, config: Config, field_map: FieldMap, scores_df: DataFrame
) -> list[Evaluated]:
    """Return the quality of every system of the config, from its scores on the test rows."""
    group = "group" if "group" in scores_df.columns else None
    found = metrics.evaluate_systems(scores_df, group)
    valid = metrics.log_losses(all_scores_df(spark, config, field_map, "valid"))
    deciles = metrics.score_buckets(scores_df, 10)
    fine = metrics.score_buckets(scores_df, ROC_BUCKETS)
    return [
        Evaluated(
            system,
            found[system.name],
            valid[system.name],
            deciles[system.name],
            metrics.roc_points(fine[system.name]),
        )
        for system in config.systems
    ]


def best_reachable(config: Config, scores_df: DataFrame) -> Metrics | None:
    """Return the metrics of the true probabilities, where a made-up log has them."""
    if config.evaluation.truth is None:
        return None
    one_df = scores_df.where(F.col("system") == config.systems[0].name)
    return metrics.evaluate(one_df.select("label", F.col("truth").alias("score")))


def _result(
    config: Config, field_map: FieldMap, one: Evaluated, done: dict[str, Facts]
) -> dict[str, Any]:
    """Return the entry of results.json."""
    system, name = one.system, one.system.name
    noted = done["train_lr"] if system.system == "lr" else done["train_lc"]["systems"][name]
    return {
        "system": name,
        "auc": one.metrics.auc,
        "logloss": one.metrics.logloss,
        "ne": one.metrics.ne,
        "calibration": one.metrics.calibration,
        "group_auc": one.metrics.group_auc,
        "valid_logloss": one.valid_logloss,
        "parameters": parameters_of(config, field_map, system).total,
        "seconds_per_epoch": noted["seconds_per_epoch"],
        "train_rows": done["features"]["shard_rows"]["train"],
        "test_rows": one.metrics.rows,
        "run_id": noted["run_id"],
    }


def _write_evaluation(
    spark: SparkSession,
    config: Config,
    field_map: FieldMap,
    results: list[dict[str, Any]],
    evaluated: list[Evaluated],
) -> int:
    rows = []
    for result, one in zip(results, evaluated, strict=True):
        deciles = [(b.rows, b.positives, b.mean_score) for b in one.deciles]
        row = (*(result[key] for key in RESULT_SCHEMA), field_map.fingerprint, deciles, config.day)
        rows.append(row)
    columns = ", ".join(f"{key} {kind}" for key, kind in RESULT_SCHEMA.items())
    bucket = "struct<rows: long, positives: long, mean_score: double>"
    schema = f"{columns}, fingerprint string, deciles array<{bucket}>, day date"
    # A run by the day adds its rows to those of other days.
    daily = config.split.by == "window"
    condition = tables.date_condition("day", run_day(config)) if daily else None
    table_df = spark.createDataFrame(rows, schema)
    return tables.write(table_df, config, "evaluation", replace_where=condition)


def make_bundle(config: Config, system: System, bundle: Path) -> Path:
    """Put a system's model, the field map and the vocabulary into a folder, ready to register."""
    bundle.mkdir(exist_ok=True)
    source = config.run_path
    for path in (
        source / "models" / model_folder(system) / models.MODEL_FILE,
        source / "models" / model_folder(system) / models.DESCRIPTION_FILE,
        source / "field_map.json",
        source / "vocabulary.parquet",
    ):
        files.copy(path, bundle / path.name)
    counts = source / drift.TRAIN_COUNTS
    if counts.is_file():  # shards made by an earlier version have none
        files.copy(counts, bundle / counts.name)
    return bundle
