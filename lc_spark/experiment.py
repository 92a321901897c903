"""Runs systems x starts x seeds on the same shards, and scores them all on the same test rows."""

import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rich.box
import rich.table
from pyspark.sql import SparkSession

from lc_spark import (
    bootstrap,
    evaluate,
    experiment_report,
    facts,
    metrics,
    pipeline,
    stages,
    tables,
    tracking,
)
from lc_spark.comparison import Cell, Outcome
from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.evaluation_report import parameters_of
from lc_spark.facts import Facts
from lc_spark.field_map import FieldMap
from lc_spark.systems import LC_SYSTEMS, System, Variant
from lc_spark.tracking import StageRun
from lc_spark.training import launch, spec

log = logging.getLogger("lc_spark")

WATCHED = ("test",)  # curves only: what is kept and compared is chosen by the valid split
MOST_DEATHS = 2  # launches in a row that end without one trained cell


def cells(config: Config) -> list[Cell]:
    """Return every run of the experiment; LR, which has no seed, is one and comes first."""
    listed = config.experiment.systems or config.systems
    lr = next((system for system in listed if system.system == "lr"), System(system="lr"))
    found = [Cell(lr, lr.name, "", None)]
    for system in listed:
        if system.system == "lr":
            continue
        crossed = system.system in LC_SYSTEMS and "start" not in system.training
        variants: Sequence[Variant | None] = config.experiment.starts if crossed else ()
        for variant in variants or (None,):
            for seed in config.experiment.seeds:
                found.append(_cell(system, variant, seed))
    return found


def _cell(system: System, variant: Variant | None, seed: int) -> Cell:
    parts = [system.name, *([variant.name] if variant else []), f"seed{seed}"]
    training = {**(variant.training if variant else {}), **system.training}
    own = System(system=system.system, name="_".join(parts), training=training)
    return Cell(own, system.name, variant.name if variant else "", seed)


def expanded(config: Config, todo: Sequence[Cell]) -> Config:
    """Return the config with one system a cell."""
    systems = [cell.system.model_dump() for cell in todo]
    return Config.model_validate({**config.model_dump(), "systems": systems})


def plan(config: Config) -> rich.table.Table:
    """Return what run_experiment would train, with parameters where the features are known."""
    todo = cells(config)
    full = expanded(config, todo)
    path = config.workspace_path / "field_map.json"
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

    path: Path
    digest: str
    parent: str = ""
    runs: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config) -> "_State":
        state = cls(config.workspace_path / "experiment.json", config.digest())
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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"digest": self.digest, "parent": self.parent, "runs": self.runs}
        self.path.write_text(json.dumps(content, indent=1), encoding="utf-8")


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
        outcomes = _train(spark, full, todo, state)
        made = _evaluate(spark, config, outcomes, state)
    except BaseException:
        tracking.end_run(config, state.parent, "FAILED")
        raise
    tracking.end_run(config, state.parent, "FINISHED")
    state.path.unlink()
    return made


def _train(spark: SparkSession, full: Config, todo: Sequence[Cell], state: _State) -> list[Outcome]:
    """Train all cells but LR, each once; return what became of each."""
    specs: dict[str, spec.TrainSpec] = {}
    for cell in todo[1:]:
        name = cell.system.name
        if name not in state.runs:
            run = tracking.start_child(full, state.parent, name)
            run.log_params(full.training_of(cell.system).model_dump(mode="json"))
            tags = {"system": cell.system.system, "start": cell.start, "seed": str(cell.seed)}
            run.set_tags(tags)
            state.runs[name] = run.run_id
            state.save()
        specs[name] = launch.train_spec(
            full, cell.system, state.runs[name], seed=cell.seed, watch=WATCHED
        )
    results = _launch_all(spark, specs)
    outcomes = [Outcome(todo[0], facts.read(full, "train_lr"), "")]
    for cell in todo[1:]:
        result = results[cell.system.name]
        error = str(result.get("error", ""))
        outcomes.append(Outcome(cell, result, error))
        run_id = state.runs[cell.system.name]
        tracking.end_run(full, run_id, "FAILED" if error else "FINISHED")
    return outcomes


def _launch_all(spark: SparkSession, specs: dict[str, spec.TrainSpec]) -> dict[str, Facts]:
    """Return the result of every spec, {"error": sentence} for one that could not be trained.

    When the ranks die, the cell that they were at has failed, and the others go on in new ones.
    """
    results: dict[str, Facts] = {}
    pending = dict(specs)
    for name, one in specs.items():
        done = spec.finished(one)
        if done is not None:
            _log_epochs(one, done)
            results[name] = done
            del pending[name]
    if results:
        log.info("experiment: %d of %d cells were trained before", len(results), len(specs))
    deaths = 0
    while pending:
        try:
            made = launch.launch_specs(spark, list(pending.values()))
            results |= dict(zip(pending, made, strict=True))
            break
        except LcSparkError as error:
            done_now = {n: r for n, s in pending.items() if (r := spec.finished(s)) is not None}
            deaths = 0 if done_now else deaths + 1
            results |= done_now
            left = [name for name in pending if name not in done_now]
            died = left if deaths == MOST_DEATHS else left[:1]
            results |= {name: {"error": str(error)} for name in died}
            log.warning("experiment: %s failed: %s", ", ".join(died), error)
            pending = {name: pending[name] for name in left if name not in died}
    return results


def _log_epochs(one: spec.TrainSpec, result: Facts) -> None:
    run = StageRun(str(one.tracking_uri), str(one.run_id))
    for entry in result["epochs"]:
        run.log_metrics(*spec.curves(entry, one.training["evaluations"]))


def _evaluate(spark: SparkSession, config: Config, outcomes: list[Outcome], state: _State) -> Facts:
    trained = [outcome for outcome in outcomes if not outcome.error]
    if len(trained) < 2:
        errors = "; ".join(sorted({o.error for o in outcomes if o.error}))
        raise LcSparkError(f"No cell of the experiment could be trained: {errors}")
    some = expanded(config, [outcome.cell for outcome in trained])
    field_map = stages.read_field_map(some)
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
