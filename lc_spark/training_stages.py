"""The two stages that train: LR by MLlib or torch, then the LC systems by TorchDistributor."""

import contextlib
import logging
from collections.abc import Sequence

from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, SparkSession

from lc_spark import figures, files, metrics, refresh, session, tables, tracking
from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.evaluation_report import history
from lc_spark.facts import Facts
from lc_spark.features.shards import read_field_map, read_manifest
from lc_spark.features.vectors import read_shards, shard_vectors
from lc_spark.field_map import FieldMap
from lc_spark.training import launch, lr, lr_choice
from lc_spark.training.lr_network import WEIGHTS_FILE

log = logging.getLogger("lc_spark")


def train_lr_stage(spark: SparkSession, config: Config, parent: str) -> Facts:
    """Train shards -> models/lr, Delta lr_weights; and the LRs that a start holds rows out of."""
    field_map = read_field_map(config)
    by = _lr_by(spark, config, field_map)
    manifest = read_manifest(config)
    parts = lr.held_out_parts(config, manifest)
    for split in ("train", "valid"):
        if not 0 < manifest["splits"][split]["positives"] < manifest["splits"][split]["rows"]:
            raise LcSparkError(f"The {split} split has rows of one label only: check 'split'.")
    with tracking.stage(config, parent, "lr") as run:
        run.log_params(config.lr.model_dump())
        run.set_tags({"fingerprint": field_map.fingerprint})
        run.set_tags({"lr_by": by})
        fit_by = _lr_by_torch if by == "torch" else _lr_by_mllib
        made, weights_df = fit_by(spark, config, field_map, parts)
        levels_df = tables.read(spark, config, "vocabulary")
        version = tables.write(lr.with_levels(weights_df, levels_df), config, "lr_weights")
        (config.run_path / WEIGHTS_FILE).unlink(missing_ok=True)
        history, aucs = made["loss_history"], made["aucs"]
        for step, loss in enumerate(history):
            run.log_metrics({"objective": loss}, step)
        run.log_figure(figures.lr_loss(history), "lr_loss.svg")
        run.set_tags({"lr_weights_version": str(version)})
        run.log_metrics({key: made[key] for key in ("iterations", "seconds_per_epoch", "l2")})
        run.log_metrics({f"{rows}_auc": auc for rows, auc in aucs.items()})
        return {
            **made,
            "by": by,
            "run_id": run.run_id,
            "summary": f"l2 {made['l2']:g}, {made['iterations']} passes by {by} over "
            f"{field_map.d:,} weights, objective {history[0]:.5f} -> {history[-1]:.5f}; AUC "
            + ", ".join(f"{rows} {auc:.4f}" for rows, auc in aucs.items())
            + "; table lr_weights",
        }


def _lr_by(spark: SparkSession, config: Config, field_map: FieldMap) -> str:
    """Return what fits LR, "mllib" or "torch", by the memory that this driver has."""
    heap, tasks = session.heap_and_tasks(spark)
    return lr_choice.chosen(config.lr, field_map.d, tasks, heap)


def _lr_by_mllib(
    spark: SparkSession, config: Config, field_map: FieldMap, parts: dict[str, Column]
) -> tuple[Facts, DataFrame]:
    """Fit all LRs by MLlib, one after the other; return facts and (field, index, weight)."""
    vectors = {
        split: shard_vectors(
            spark, config, field_map, split, files.uri(config.run_path / "vectors" / split)
        )
        for split in ("train", "valid")
    }
    train_df = vectors["train"].persist(StorageLevel.MEMORY_AND_DISK)
    unfit = _forget_unfit(config, train_df, parts)
    starts = _lr_starts(config, field_map, ("lr", *parts))
    fit, model, valid_losses = lr.fit_path(train_df, vectors["valid"], config, starts.get("lr"))
    lr.save_lr(fit, config, field_map)
    held_out = lr.fit_held_out(train_df, parts, fit.l2, config, field_map, starts)
    # AUC on the rows it was fitted on, beside that on rows it has not seen: how much it leaks.
    aucs = {
        "train": metrics.exact_auc(lr.scores_df(model, train_df)),
        "valid": metrics.exact_auc(lr.scores_df(model, vectors["valid"])),
        **held_out,
    }
    train_df.unpersist()
    files.remove(config.run_path / "vectors")
    made = {
        "seconds_per_epoch": fit.seconds / max(fit.iterations, 1),
        "loss_history": fit.loss_history,
        "l2": fit.l2,
        "iterations": fit.iterations,
        "valid_logloss_by_l2": valid_losses,
        "aucs": aucs,
        "unfit": unfit,
    }
    return made, lr.weights_df(spark, fit, field_map)


def _lr_by_torch(
    spark: SparkSession, config: Config, field_map: FieldMap, parts: dict[str, Column]
) -> tuple[Facts, DataFrame]:
    """Fit all LRs by torch, together; return facts and (field, index, weight).

    They begin at zero in a run by the day too: a pass or two is all that there is to save.
    """
    train_df = read_shards(spark, config, "train")
    unfit = _forget_unfit(config, train_df, parts)
    of_parts = lr.torch_parts(train_df, parts, read_manifest(config))
    result = launch.launch_lr(spark, config, of_parts)
    valid_losses = dict(result.pop("valid_losses"))
    for l2, loss in valid_losses.items():
        log.info("train_lr: l2 %g: validation log loss %.5f", l2, loss)
    before, *_, after = result["loss_history"]
    if after > before:
        log.warning(
            "train_lr: the objective grew from %.5f to %.5f: the steps are too long for a row with "
            "%d fields. Lower lr.learning_rate (%g).",
            before,
            after,
            len(field_map.fields),
            config.lr.learning_rate,
        )
    made = {**result, "valid_logloss_by_l2": valid_losses, "unfit": unfit}
    return made, spark.read.parquet(files.uri(config.run_path / WEIGHTS_FILE))


def _forget_unfit(config: Config, train_df: DataFrame, parts: dict[str, Column]) -> dict[str, str]:
    """Take the parts that cannot be fitted out of parts, with the models that they had; say why."""
    unfit = lr.unfit_parts(train_df, parts)
    for name, why in unfit.items():
        log.warning("train_lr: %s", why)
        files.remove(config.run_path / "models" / name)
        del parts[name]
    return unfit


def _lr_starts(config: Config, field_map: FieldMap, names: Sequence[str]) -> dict[str, lr.LrStart]:
    """Return where LRs begin that the run's parent has too, by folder name."""
    before = refresh.parent_of(config)
    if before is None:
        return {}
    folder = before.path(config)
    places = FieldMap.read(folder / "field_map.json").places_in(field_map)
    known = [name for name in names if (folder / "models" / name).exists()]
    return {n: lr.start_of(folder / "models" / n, places, field_map.d) for n in known}


def train_lc_stage(spark: SparkSession, config: Config, parent: str) -> Facts:
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
