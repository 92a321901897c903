"""The stages of the pipeline: each opens a child of one parent MLflow run and returns its facts."""

import contextlib
import dataclasses
import datetime
import json
import logging
import shutil
from collections.abc import Callable

import pandas as pd
import pyarrow.parquet as pq
from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from lc_spark import evaluate, figures, ingest, metrics, scoring, tables, tracking
from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.evaluation_report import history
from lc_spark.facts import Facts
from lc_spark.features import drift
from lc_spark.features.auto_crosses import ChosenCross, choose_crosses
from lc_spark.features.fit import fit_features
from lc_spark.features.shards import read_manifest, write_shards
from lc_spark.field_map import FieldMap, require_same
from lc_spark.training import launch, lr

log = logging.getLogger("lc_spark")

Stage = Callable[[SparkSession, Config, str, datetime.date | None], Facts]


def ingest_stage(
    spark: SparkSession, config: Config, parent: str, date: datetime.date | None
) -> Facts:
    """Source -> Delta raw and rejected."""
    with tracking.stage(config, parent, "ingest") as run:
        made = ingest.ingest(spark, config, date)
        counts = {"source_rows": made.source_rows, "raw_rows": made.raw_rows}
        run.log_metrics(counts | {"rejected_rows": sum(made.rejected.values())})
        run.set_tags({"raw_version": str(made.raw_version), "date": str(date or "all")})
        run.log_text(json.dumps(made.rejected, indent=1), "rejected.json")
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in made.rejected.items()) or "none"
        summary = (
            f"{made.source_rows:,} source rows = {made.raw_rows:,} raw + "
            f"{sum(made.rejected.values()):,} rejected ({reasons})"
        )
        return {**vars(made), "run_id": run.run_id, "summary": summary}


def features_stage(
    spark: SparkSession, config: Config, parent: str, _date: datetime.date | None
) -> Facts:
    """Delta raw -> field map, Delta vocabulary, shards with a manifest."""
    with tracking.stage(config, parent, "features") as run:
        raw_version = tables.version(spark, config, "raw")
        raw_df = tables.read(spark, config, "raw", raw_version)
        split_df = raw_df.withColumn("split", ingest.split_column(config))
        train_df = split_df.where(F.col("split") == "train")
        crosses = _auto_crosses(train_df, config, run)
        fields = (*config.fields, *(chosen.cross for chosen in crosses))
        fitted = fit_features(train_df, fields, config.seed)
        vocabulary_version = tables.write(fitted.levels_df, config, "vocabulary", ("field",))
        fitted.field_map.write(config.workspace_path / "field_map.json")
        pq.write_table(fitted.vocabulary.to_arrow(), config.workspace_path / "vocabulary.parquet")
        manifest = write_shards(raw_df, fitted.field_map, fitted.vocabulary, config, raw_version)
        split_rows = {r["split"]: r["count"] for r in split_df.groupBy("split").count().collect()}
        shard_rows = {split: part["rows"] for split, part in manifest["splits"].items()}
        if split_rows != shard_rows:
            raise LcSparkError(
                f"raw has {split_rows} rows, the shards {shard_rows}: 'raw' changed while they "
                "were written. Run the stage 'features' again."
            )
        field_map = fitted.field_map
        train_counts = drift.count_shards(lr.read_shards(spark, config, "train"), field_map)
        counts_path = config.workspace_path / drift.TRAIN_COUNTS
        counts_path.write_text(train_counts.to_json(), encoding="utf-8")
        run.log_params({"features": field_map.d, "fields": len(field_map.fields)})
        run.log_metrics({f"{split}_rows": n for split, n in shard_rows.items()})
        run.log_text(field_map.to_json(), "field_map.json")
        run.set_tags(
            {
                "fingerprint": field_map.fingerprint,
                "raw_version": str(raw_version),
                "vocabulary_version": str(vocabulary_version),
            }
        )
        parts = " + ".join(f"{shard_rows[s]:,} {s}" for s in ("train", "valid", "test"))
        return {
            "raw_rows": sum(split_rows.values()),
            "shard_rows": shard_rows,
            "features": field_map.d,
            "fields": len(field_map.fields),
            "fingerprint": field_map.fingerprint,
            "auto_crosses": [dataclasses.asdict(chosen) for chosen in crosses],
            "run_id": run.run_id,
            "summary": f"{sum(split_rows.values()):,} raw rows = {parts} in the shards; "
            f"{len(field_map.fields)} fields, {field_map.d:,} features",
        }


def _auto_crosses(train_df: DataFrame, config: Config, run: tracking.StageRun) -> list[ChosenCross]:
    """Choose crosses where the config asks for it; log them, and every pair that was tried."""
    if config.features.crosses == "listed":
        return []
    choice = choose_crosses(train_df, config)
    for cross in choice.chosen:
        log.info(
            "features: cross %s: %.6f nats a row gained (standard error %.6f), %s cells",
            " x ".join(cross.of),
            cross.gain,
            cross.standard_error,
            f"{cross.cells:,}",
        )
    log.info(
        "features: %d crosses chosen of %s pairs tried; of %d pairs one field determines the "
        "other, %s were not tried",
        len(choice.chosen),
        f"{len(choice.tried):,}",
        choice.determined,
        f"{choice.untried:,}",
    )
    for name, pairs in (("chosen", choice.chosen), ("tried", choice.tried)):
        table = pd.DataFrame([dataclasses.asdict(pair) for pair in pairs])
        if pairs:
            table["of"] = table["of"].str.join(" x ")
            run.log_table(table, f"auto_crosses_{name}.json")
    return choice.chosen


def train_lr_stage(
    spark: SparkSession, config: Config, parent: str, _date: datetime.date | None
) -> Facts:
    """Train shards -> models/lr, Delta lr_weights; and the LRs that a start holds rows out of."""
    field_map = read_field_map(config)
    manifest = read_manifest(config)
    parts = lr.held_out_parts(config, manifest)
    for split in ("train", "valid"):
        if not 0 < manifest["splits"][split]["positives"] < manifest["splits"][split]["rows"]:
            raise LcSparkError(f"The {split} split has rows of one label only: check 'split'.")
    with tracking.stage(config, parent, "lr") as run:
        run.log_params(config.lr.model_dump())
        run.set_tags({"fingerprint": field_map.fingerprint})
        vectors = {
            split: lr.shard_vectors(
                spark, config, field_map, split, str(config.workspace_path / "vectors" / split)
            )
            for split in ("train", "valid")
        }
        train_df = vectors["train"].persist(StorageLevel.MEMORY_AND_DISK)
        unfit = lr.unfit_parts(train_df, parts)
        for name, why in unfit.items():
            log.warning("train_lr: %s", why)
            shutil.rmtree(config.workspace_path / "models" / name, ignore_errors=True)
        parts = {name: seen for name, seen in parts.items() if name not in unfit}
        fit, model, valid_losses = lr.fit_path(train_df, vectors["valid"], config)
        lr.save_lr(fit, config, field_map)
        held_out = lr.fit_held_out(train_df, parts, fit.l2, config, field_map)
        # AUC on the rows it was fitted on, beside that on rows it has not seen: how much it leaks.
        aucs = {
            "train": metrics.exact_auc(lr.scores_df(model, train_df)),
            "valid": metrics.exact_auc(lr.scores_df(model, vectors["valid"])),
            **held_out,
        }
        train_df.unpersist()
        shutil.rmtree(config.workspace_path / "vectors")
        levels_df = tables.read(spark, config, "vocabulary")
        weights_df = lr.lr_weights_df(spark, fit, levels_df, field_map)
        version = tables.write(weights_df, config, "lr_weights", ("field",))
        for step, loss in enumerate(fit.loss_history):
            run.log_metrics({"objective": loss}, step)
        run.log_figure(figures.lr_loss(fit.loss_history), "lr_loss.svg")
        run.set_tags({"lr_weights_version": str(version)})
        per_pass = fit.seconds / max(fit.iterations, 1)
        run.log_metrics({"iterations": fit.iterations, "seconds_per_epoch": per_pass, "l2": fit.l2})
        run.log_metrics({f"{rows}_auc": auc for rows, auc in aucs.items()})
        return {
            "seconds_per_epoch": per_pass,
            "loss_history": fit.loss_history,
            "l2": fit.l2,
            "valid_logloss_by_l2": valid_losses,
            "aucs": aucs,
            "unfit": unfit,
            "run_id": run.run_id,
            "summary": f"l2 {fit.l2:g}, {fit.iterations} passes over {field_map.d:,} weights, "
            f"objective {fit.loss_history[0]:.5f} -> {fit.loss_history[-1]:.5f}; AUC "
            + ", ".join(f"{rows} {auc:.4f}" for rows, auc in aucs.items())
            + "; table lr_weights",
        }


def train_lc_stage(
    spark: SparkSession, config: Config, parent: str, _date: datetime.date | None
) -> Facts:
    """Train shards and models/lr -> models/<system>, one child run a system."""
    field_map = read_field_map(config)
    systems = [system for system in config.systems if system.system != "lr"]
    trained: Facts = {}
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(tracking.stage(config, parent, s.name)) for s in systems]
        for system, run in zip(systems, runs, strict=True):
            run.log_params(config.training_of(system).model_dump(mode="json"))
            run.set_tags({"fingerprint": field_map.fingerprint, "system": system.system})
        results = launch.launch(spark, config, systems, [run.run_id for run in runs])
        failed = {s.name: r["error"] for s, r in zip(systems, results, strict=True) if "error" in r}
        for system, run, result in zip(systems, runs, results, strict=True):
            if system.name in failed:
                continue
            losses = figures.loss_by_epoch({system.name: history(result)})
            run.log_figure(losses, "loss.svg")
            trained[system.name] = {**result, "run_id": run.run_id}
            log.info(
                "train_lc: %s: best epoch %.3g of %.3g, validation AUC %.4f; %s train rows = %s "
                "seen in an epoch + %s left over",
                system.name,
                result["best_epoch"],
                result["epochs"][-1]["epoch"],
                result["best_valid_auc"],
                f"{result['rows_per_epoch'] + result['rows_left_over']:,}",
                f"{result['rows_per_epoch']:,}",
                f"{result['rows_left_over']:,}",
            )
    for system, run in zip(systems, runs, strict=True):
        if system.name in failed:
            tracking.end_run(config, run.run_id, "FAILED")
    if failed:
        raise LcSparkError("; ".join(f"Training '{n}': {error}" for n, error in failed.items()))
    return {"systems": trained, "summary": f"trained {', '.join(trained) or 'nothing'}"}


def evaluate_stage(
    spark: SparkSession, config: Config, parent: str, _date: datetime.date | None
) -> Facts:
    """Test shards and models -> Delta test_scores and evaluation, report, registered winner."""
    with tracking.stage(config, parent, "evaluate") as run:
        return evaluate.evaluate_systems(spark, config, run)


def score_stage(
    spark: SparkSession, config: Config, parent: str, date: datetime.date | None
) -> Facts:
    """Source rows of a date, or all of raw, and the champion -> Delta scores, drift of fields."""
    with tracking.stage(config, parent, "score") as run:
        return scoring.score_with_champion(spark, config, run, date)


def read_field_map(config: Config) -> FieldMap:
    """Return the workspace's field map, after a look whether the shards are of it."""
    field_map = FieldMap.read(config.workspace_path / "field_map.json")
    require_same(field_map.fingerprint, read_manifest(config)["fingerprint"], "The shards")
    return field_map


STAGES: dict[str, Stage] = {
    "ingest": ingest_stage,
    "features": features_stage,
    "train_lr": train_lr_stage,
    "train_lc": train_lc_stage,
    "evaluate": evaluate_stage,
    "score": score_stage,
}
