"""Turns the outcomes of an experiment's cells into the paper's tables, figures and the report."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from lc_spark import bootstrap, facts, figures, paper, report, resources
from lc_spark.comparison import (
    Line,
    Outcome,
    claims_of,
    curves_of,
    interval_text,
    lines_of,
    speeds_of,
)
from lc_spark.config import Config
from lc_spark.evaluation_report import base_content, crosses_table, parameters_of
from lc_spark.facts import Facts
from lc_spark.features.shards import read_manifest
from lc_spark.field_map import FieldMap
from lc_spark.metrics import Metrics
from lc_spark.paper import PAPER_AUC, Table
from lc_spark.report import ReportContent
from lc_spark.tracking import StageRun

STARTS_FIGURE = "The starts of M1 by epoch"


def content(
    spark: SparkSession,
    config: Config,
    field_map: FieldMap,
    outcomes: Sequence[Outcome],
    found: Mapping[str, Metrics],
    redrawn: Mapping[str, NDArray[np.float64]],
    best: Metrics | None,
) -> ReportContent:
    """Return the report of all cells; config has one system a trained cell, LR first."""
    lines = lines_of(outcomes, found, redrawn)
    done = {name: facts.read(config, name) for name in ("ingest", "features", "train_lr")}
    base = base_content(spark, config, field_map, done)
    one_a_system = {o.cell.label: o for o in outcomes if not o.error}
    named = [
        (name, outcome.cell.system.system, config.training_of(outcome.cell.system))
        for name, outcome in one_a_system.items()
    ]
    curves = curves_of(lines)
    claims = claims_of(lines, redrawn)
    lr_test = found[outcomes[0].cell.system.name]
    tables = [
        paper.table_1(config.name, field_map, read_manifest(config)),
        paper.table_3(field_map, named),
        _table_4(lines, best),
        _leak_table(done["train_lr"], lr_test.auc),
        *crosses_table(done),
        resources.table(done),
        *([_failed_table(outcomes)] if any(o.error for o in outcomes) else []),
    ]
    drawn = [
        ("Seconds per epoch (the paper's Fig. 6)", figures.seconds_per_epoch(speeds_of(lines)))
    ]
    if curves:
        drawn.insert(0, (STARTS_FIGURE, figures.ablation(curves, lr_test.logloss)))
    return dataclasses.replace(
        base,
        results=[_result(config, field_map, line) for line in lines],
        best=None if best is None else dataclasses.asdict(best),
        tables=tables,
        claims=claims,
        further_figures=drawn,
        wide_figures=(STARTS_FIGURE,),
        data={"cells": [_cell_entry(o, found) for o in outcomes], "curves": curves},
    )


def write(config: Config, made: ReportContent, run: StageRun) -> Facts:
    """Write report and results.json, log both; return where they are and what won."""
    page = report.write_report(config, made)
    run.log_text(page.read_text(encoding="utf-8"), "report.html")
    for what, figure in made.further_figures:
        run.log_figure(figure, f"{what.split(' (')[0].lower().replace(' ', '_')}.svg")
    return {
        "report": str(page),
        "results": made.results,
        "best": made.best,
        "claims": made.claims,
        "run_id": run.run_id,
    }


def _result(config: Config, field_map: FieldMap, line: Line) -> dict[str, Any]:
    """Return a line of the page's first table, means over seeds."""
    manifest = read_manifest(config)
    is_lr = line.trained[0].cell.seed is None
    first = line.trained[0].result
    return {
        "system": line.name,
        **{key: line.mean(key) for key in ("auc", "logloss", "ne", "calibration")},
        "group_auc": line.mean("group_auc") if line.metrics[0].group_auc is not None else None,
        "valid_logloss": min(first["valid_logloss_by_l2"].values())
        if is_lr
        else line.noted("best_valid_logloss"),
        "parameters": parameters_of(config, field_map, line.trained[0].cell.system).total,
        "seconds_per_epoch": line.noted("seconds_per_epoch"),
        "train_rows": manifest["splits"]["train"]["rows"],
        "test_rows": line.metrics[0].rows,
        "run_id": ", ".join(str(o.result.get("run_id", "")) for o in line.trained),
    }


def _table_4(lines: Sequence[Line], best: Metrics | None) -> Table:
    rows = []
    for line in lines:
        paper_auc = PAPER_AUC.get(line.trained[0].cell.system.system, (None, None))
        rows.append(
            {
                "system": line.name,
                "seeds": len(line.trained),
                "auc": line.mean("auc"),
                "auc_sd": line.sd("auc"),
                "auc_gain": interval_text(line.auc_gain, ".4f"),
                "logloss": line.mean("logloss"),
                "logloss_sd": line.sd("logloss"),
                "logloss_gain": interval_text(line.logloss_gain, ".5f"),
                "paper_app": paper_auc[0],
                "paper_feeds": paper_auc[1],
            }
        )
    if best is not None:
        rows.append({"system": report.BEST, "auc": best.auc, "logloss": best.logloss})
    columns = {
        "system": ("system, start", ""),
        "seeds": ("runs", ",d"),
        "auc": ("AUC", ".4f"),
        "auc_sd": ("sd", ".4f"),
        "auc_gain": ("AUC − LR", ""),
        "logloss": ("log loss", ".5f"),
        "logloss_sd": ("sd", ".5f"),
        "logloss_gain": ("log loss − LR", ""),
        "paper_app": ("paper, AppData", ".4f"),
        "paper_feeds": ("paper, FeedsData", ".4f"),
    }
    return Table(
        "table_4",
        "Quality on the test rows (the paper's Table 4)",
        "Mean and standard deviation over the seeds. In brackets the 95 % interval of the "
        f"difference to LR, by {bootstrap.REPLICATES} bootstrap draws of the test rows (of "
        f"{bootstrap.MOST_ROWS:,} sampled ones where there are more; the same for all systems) "
        "and of the seeds.",
        columns,
        [{key: row.get(key) for key in columns} for row in rows],
    )


def _leak_table(lr_facts: Facts, test_auc: float) -> Table:
    """Return LR's AUC on rows that it was fitted on and on others: how much its weights leak."""
    names = {"train": "the train rows it was fitted on", "valid": "the valid rows"}
    rows = [{"rows": names.get(k, k), "auc": auc} for k, auc in lr_facts["aucs"].items()]
    rows.append({"rows": "the test rows", "auc": test_auc})
    for row in rows:
        if row["rows"] == "lr_cross_fitted":
            row["rows"] = "train rows of the fold it has not seen (lr_cross_fitted)"
        elif row["rows"].startswith("lr_past_"):
            days = row["rows"].removeprefix("lr_past_")
            row["rows"] = f"the last {days} train days, fitted on those before (lr_past)"
    return Table(
        "lr_leak",
        "What LR knows of the rows it was fitted on",
        f"AUC of LR, l2 {lr_facts['l2']:g}. A network that starts from the first sees inputs that "
        "are better on its own train rows than on any others.",
        {"rows": ("rows", ""), "auc": ("AUC of LR", ".4f")},
        rows,
    )


def _failed_table(outcomes: Sequence[Outcome]) -> Table:
    rows = [{"cell": o.cell.system.name, "error": o.error} for o in outcomes if o.error]
    return Table(
        "failed",
        "Cells that could not be trained",
        "The other cells are not touched by this. Started again, these are tried again.",
        {"cell": ("cell", ""), "error": ("why", "")},
        rows,
    )


def _cell_entry(outcome: Outcome, found: Mapping[str, Metrics]) -> dict[str, Any]:
    cell = outcome.cell
    entry: dict[str, Any] = {
        "cell": cell.system.name,
        "system": cell.label,
        "start": cell.start,
        "seed": cell.seed,
        "error": outcome.error or None,
    }
    if not outcome.error:
        entry |= dataclasses.asdict(found[cell.system.name])
        entry["epochs"] = outcome.result.get("epochs")
    return entry
