"""Runs the stages, for spark-submit, ``lc-spark run``, experiments and the tests alike.

A stage notes its facts in ``workspace/stages`` and logs in one line what it made.
"""

import datetime
import logging
import time

from pyspark.sql import SparkSession

from lc_spark import facts, tracking
from lc_spark.config import Config
from lc_spark.facts import Facts
from lc_spark.stages import STAGES

log = logging.getLogger("lc_spark")

RUN_STAGES = ("ingest", "features", "train_lr", "train_lc", "evaluate")


def run_stage(
    name: str,
    spark: SparkSession,
    config: Config,
    date: datetime.date | None = None,
    parent: str | None = None,
) -> Facts:
    """Run one stage, note its facts and seconds in ``stages/<name>.json``, and return them.

    parent is the MLflow run that the stage's run goes under: by default that of the pipeline.
    """
    under = parent or _parent_run(config, new=name == "ingest")
    facts.forget(config, name)
    log.info("%s: started", name)
    started = time.perf_counter()
    try:
        made = STAGES[name](spark, config, under, date)
    except BaseException:
        tracking.end_run(config, under, "FAILED")
        raise
    made["seconds"] = round(time.perf_counter() - started, 1)
    made["settings"] = facts.settings_digest(config, name)
    facts.write(config, name, made)
    if name == "evaluate":
        tracking.end_run(config, under, "FINISHED")
    log.info("%s: %s (%.0f s)", name, made.pop("summary"), made["seconds"])
    return made


def _parent_run(config: Config, new: bool) -> str:
    """Return the pipeline's MLflow run: ingest begins a new one, later stages go on with it."""
    path = config.workspace_path / "run_id"
    if new or not path.is_file():
        run_id = tracking.start_pipeline(config, {"config": config.name})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(run_id, encoding="utf-8")
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
    run_stage(name, spark, config, None, parent)
