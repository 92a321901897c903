"""Runs the stages, for spark-submit, ``lc-spark run``, experiments and the tests alike.

A stage notes its facts in ``workspace/stages`` and logs in one line what it made.
"""

import importlib
import logging
import time
from collections.abc import Callable

from pyspark.sql import SparkSession

from lc_spark import facts, failures, files, resources, tracking
from lc_spark.config import Config
from lc_spark.facts import Facts

log = logging.getLogger("lc_spark")

Stage = Callable[[SparkSession, Config, str], Facts]
# A stage's module is imported when it runs: torch and matplotlib take seconds, and ingest and
# features, a job each, need neither.
MODULES = {
    "ingest": "stages",
    "features": "stages",
    "train_lr": "training_stages",
    "train_lc": "training_stages",
    "evaluate": "evaluate",
    "gate": "gate",
    "promote": "gate",
    "score": "scoring",
}
RUN_STAGES = ("ingest", "features", "train_lr", "train_lc", "evaluate", "gate", "promote")


def run_stage(name: str, spark: SparkSession, config: Config, parent: str | None = None) -> Facts:
    """Run one stage, note its facts and what it took in ``stages/<name>.json``, and return them.

    parent is the MLflow run that the stage's run goes under: by default that of the pipeline.
    Raises LcSparkError, beside what the stage itself refuses, for a full disk, spent memory and
    damaged files.
    """
    with failures.told(spark, f"The stage '{name}'", config.workspace_path):
        return _run(name, spark, config, parent)


def _run(name: str, spark: SparkSession, config: Config, parent: str | None) -> Facts:
    under = parent or _parent_run(config, new=name == "ingest")
    stage: Stage = getattr(importlib.import_module(f"lc_spark.{MODULES[name]}"), f"{name}_stage")
    facts.forget(config, name)
    log.info("%s: started; MLflow run %s", name, tracking.address_of(config, under))
    # Spark's pages tell whose job it was. Not by setJobGroup: its description would take the place
    # of the line of code that a query comes from.
    spark.sparkContext.setLocalProperty("spark.jobGroup.id", name)
    began, started = time.time(), time.perf_counter()
    try:
        with resources.watched() as peak:
            made = stage(spark, config, under)
    except BaseException:
        tracking.fail_run(config, under)
        raise
    made["seconds"] = round(time.perf_counter() - started, 1)
    made |= resources.noted(config, name, made, peak, began)
    made["settings"] = facts.settings_digest(config, name)
    # The systems of train_lc have runs of their own: what they took together is the pipeline's.
    run = tracking.append_to(tracking.uri_of(config), made.get("run_id", under))
    run.log_metrics(resources.metrics(made))
    facts.write(config, name, made)
    if name in (RUN_STAGES[-1], "score"):  # scoring may begin a run of its own: it is its last
        tracking.end_run(config, under, "FINISHED")
    log.info("%s: %s (%s)", name, made.pop("summary"), resources.text(made))
    return made


def _parent_run(config: Config, new: bool) -> str:
    """Return the pipeline's MLflow run: ingest begins a new one, later stages go on with it."""
    path = config.run_path / "run_id"
    if new or not path.is_file():
        day = {} if config.day is None else {"day": config.day.isoformat()}
        run_id = tracking.start_pipeline(config, {"config": config.name, **day})
        files.write_text(path, run_id)
    return path.read_text(encoding="utf-8")


def ensure_stage(name: str, spark: SparkSession, config: Config, parent: str) -> None:
    """Run a stage under the parent run, unless it was last run with the same settings.

    Whether the source has changed since is not looked at.
    """
    if facts.exists(config, name):
        noted = facts.read(config, name).get("settings")
        if noted == facts.settings_digest(config, name):
            log.info("%s: done before with the same settings", name)
            return
    run_stage(name, spark, config, parent)
