"""Runs systems x starts x seeds on the same shards, and scores them all on the same test rows."""

import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import rich.box
import rich.table
from pyspark.sql import SparkSession

from lc_spark import (
    bootstrap,
    evaluate,
    experiment_report,
    facts,
    failures,
    files,
    metrics,
    pipeline,
    tables,
    tracking,
)
from lc_spark.cells import Cell, cells_of
from lc_spark.comparison import Outcome
from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.evaluation_report import parameters_of
from lc_spark.facts import Facts
from lc_spark.features.shards import read_field_map
from lc_spark.field_map import FieldMap
from lc_spark.files import AnyPath
from lc_spark.tracking import StageRun
from lc_spark.training import launch, spec

log = logging.getLogger("lc_spark")

WATCHED = ("test",)  # curves only: what is kept and compared is chosen by the valid split


def cells(config: Config) -> list[Cell]:
    """Return every run of the config's experiment, LR first."""
    return cells_of(config.systems, config.experiment)


def expanded(config: Config, todo: Sequence[Cell]) -> Config:
    """Return the config with one system a cell."""
    systems = [cell.system.model_dump() for cell in todo]
    return Config.model_validate({**config.model_dump(), "systems": systems})


def plan(config: Config) -> rich.table.Table:
    """Return what run_experiment would train, with parameters where the features are known."""
    todo = cells(config)
    full = expanded(config, todo)
    path = config.run_path / "field_map.json"
    field_map = FieldMap.read(path) if path.is_file() else None
    table = rich.table.Table(title=f"{len(todo)} runs", box=rich.box.SIMPLE_HEAD)
    for heading in ("system, start", "runs", "parameters", "GB a rank"):
        table.add_column(heading, justify="left" if heading.startswith("system") else "right")
    for line, group in itertools.groupby(todo, key=lambda cell: cell.line):
        members = list(group)
        numbers = ("after 'features'", "")
        if field_map is not None:
            count = parameters_of(full, field_map, members[0].system)
            numbers = f"{count.total:,}", f"{count.training_bytes / 1e9:.2f}"
        table.add_row(line, str(len(members)), *numbers)
    return table


@dataclass
class _State:
    """What a killed experiment goes on from: its MLflow runs, kept until it has ended."""

    path: AnyPath
    digest: str
    parent: str = ""
    runs: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config) -> "_State":
        state = cls(config.run_path / "experiment.json", config.digest())
        if state.path.is_file():
            content = json.loads(state.path.read_text(encoding="utf-8"))
            if content["digest"] == state.digest:
                state.parent, state.runs = content["parent"], content["runs"]
        if not state.parent:
            tags = {"config": config.name, "kind": "experiment"}
            state.parent = tracking.start_pipeline(config, tags)
            state.save()
        return state

    def save(self) -> None:
        content = {"digest": self.digest, "parent": self.parent, "runs": self.runs}
        files.write_text(self.path, json.dumps(content, indent=1))


def run_experiment(spark: SparkSession, config: Config) -> Facts:
    """Train what is not trained yet, evaluate all of it, write the report; return what was made.

    A cell that cannot be trained is reported and does not stop the others. Started again, it goes
    on where it was. Raises LcSparkError when no cell could be trained.
    """
    todo = cells(config)
    full = expanded(config, todo)
    state = _State.of(config)
    log.info("experiment: %d cells in %s", len(todo), config.workspace)
    try:
        for stage in ("ingest", "features", "train_lr"):
            pipeline.ensure_stage(stage, spark, full, state.parent)
        with failures.told(spark, "The experiment", config.workspace_path):
            outcomes = _train(spark, full, todo, state)
            made = _evaluate(spark, config, outcomes, state)
    except BaseException:
        tracking.fail_run(config, state.parent)
        raise
    tracking.end_run(config, state.parent, "FINISHED")
    state.path.unlink()
    return made


def _train(spark: SparkSession, full: Config, todo: Sequence[Cell], state: _State) -> list[Outcome]:
    """Train all cells but LR, each once; return what became of each."""
    fingerprint = read_field_map(full).fingerprint
    specs: dict[str, spec.TrainSpec] = {}
    results: dict[str, Facts] = {}
    for cell in todo[1:]:
        name, seed = cell.system.name, cell.seed
        new = name not in state.runs
        if new:
            run = tracking.start_child(full, state.parent, name)
            run.log_params(full.training_of(cell.system).model_dump(mode="json"))
            tags = {"system": cell.system.system, "start": cell.start, "seed": str(seed)}
            run.set_tags(tags | {"fingerprint": fingerprint})
            state.runs[name] = run.run_id
            state.save()
        try:
            one = launch.train_spec(full, cell.system, state.runs[name], seed, WATCHED)
        except LcSparkError as error:
            results[name] = {"error": str(error)}
            continue
        done = spec.finished(one)
        if done is None:
            specs[name] = one
        else:
            results[name] = done
            if new:
                _log_epochs(one, done)
    if specs and len(specs) < len(todo) - 1:
        n_before = sum("error" not in result for result in results.values())
        log.info("experiment: %d of %d cells were trained before", n_before, len(todo) - 1)
    results |= _launch_all(spark, specs)
    outcomes = [Outcome(todo[0], facts.read(full, "train_lr"), "")]
    for cell in todo[1:]:
        run_id = state.runs[cell.system.name]
        result = results[cell.system.name] | {"run_id": run_id}
        why = str(result.get("error", ""))
        outcomes.append(Outcome(cell, result, why))
        tracking.end_run(full, run_id, "FAILED" if why else "FINISHED")
    return outcomes


def _launch_all(spark: SparkSession, specs: dict[str, spec.TrainSpec]) -> dict[str, Facts]:
    """Return the result of every spec, {"error": sentence} for one that could not be trained.

    When the ranks die, the cell that they were at has failed, and those not begun go on in new
    ranks. Ranks that end without beginning any cell would do so again: then all have failed.
    """
    results: dict[str, Facts] = {}
    pending = dict(specs)
    while pending:
        try:
            made = launch.launch_specs(spark, list(pending.values()))
            return results | dict(zip(pending, made, strict=True))
        except LcSparkError as error:
            death = {"error": str(error)}
            ended = _ended(pending, str(error)) or dict.fromkeys(pending, death)
            failed = [name for name, result in ended.items() if "error" in result]
            log.warning("experiment: %s failed: %s", ", ".join(failed), error)
            results |= ended
            pending = {name: one for name, one in pending.items() if name not in ended}
    return results


def _ended(pending: dict[str, spec.TrainSpec], death: str) -> dict[str, Facts]:
    """Return what became of the cells that dead ranks had begun."""
    ended: dict[str, Facts] = {}
    for name, one in pending.items():
        done, error = spec.finished(one), spec.noted_error(one)
        if done is not None:
            ended[name] = done
        elif error is not None:
            ended[name] = {"error": error or death}
    return ended


def _log_epochs(one: spec.TrainSpec, result: Facts) -> None:
    run = StageRun(str(one.tracking_uri), str(one.run_id))
    for entry in result["epochs"]:
        run.log_metrics(*spec.curves(entry, one.training["evaluations"]))


def _evaluate(spark: SparkSession, config: Config, outcomes: list[Outcome], state: _State) -> Facts:
    trained = [outcome for outcome in outcomes if not outcome.error]
    if len(outcomes) == 1:
        raise LcSparkError("The experiment has LR alone: name further systems to compare it with.")
    if len(trained) < 2:
        errors = "; ".join(sorted({o.error for o in outcomes if o.error}))
        raise LcSparkError(f"No cell of the experiment could be trained: {errors}")
    some = expanded(config, [outcome.cell for outcome in trained])
    field_map = read_field_map(some)
    with tracking.stage(config, state.parent, "evaluate") as run:
        scored_df = evaluate.all_scores_df(spark, some, field_map, "test")
        version = tables.write(scored_df, some, "experiment_scores", ("system",))
        scores_df = tables.read(spark, some, "experiment_scores", version)
        group = "group" if "group" in scores_df.columns else None
        found = metrics.evaluate_systems(scores_df, group)
        rows = next(iter(found.values())).rows
        log.info("experiment: redrawing %s test rows for the intervals", f"{rows:,}")
        redrawn = bootstrap.replicates(scores_df, rows, config.seed)
        best = evaluate.best_reachable(some, scores_df)
        run.set_tags({"experiment_scores_version": str(version)})
        _log_test_metrics(config, state, found)
        content = experiment_report.content(spark, some, field_map, outcomes, found, redrawn, best)
        return experiment_report.write(config, content, run)


def _log_test_metrics(config: Config, state: _State, found: dict[str, metrics.Metrics]) -> None:
    for name, one in found.items():
        if name in state.runs:
            numbers: dict[str, Any] = {f"final_{k}": v for k, v in one.as_floats().items()}
            StageRun(tracking.uri_of(config), state.runs[name]).log_metrics(numbers)
