"""Turns evaluated systems, and what the stages noted, into the content of the report."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from lc_spark import paper, report, resources, tables
from lc_spark.config import Config
from lc_spark.facts import Facts
from lc_spark.features.shards import read_manifest
from lc_spark.field_map import FieldMap
from lc_spark.metrics import Bucket, Metrics
from lc_spark.paper import Table
from lc_spark.parameters import ParameterCount, parameter_count
from lc_spark.systems import System
from lc_spark.training import lr

TOP = 20  # fields and values that the report lists


@dataclass(frozen=True)
class Evaluated:
    """One system on the test rows, and its validation log loss."""

    system: System
    metrics: Metrics
    valid_logloss: float
    deciles: list[Bucket]
    roc: tuple[list[float], list[float]]


def parameters_of(config: Config, field_map: FieldMap, system: System) -> ParameterCount:
    """Count the parameters of a system of the config."""
    training = config.training_of(system)
    return parameter_count(
        system.system,
        field_map.d,
        len(field_map.fields),
        training.hidden,
        training.channels,
        training.batch_norm,
    )


def base_content(
    spark: SparkSession, config: Config, field_map: FieldMap, done: dict[str, Facts]
) -> report.ReportContent:
    """Return what every report shows of the data and of LR; done has the stages up to train_lr."""
    weights_df = tables.read(spark, config, "lr_weights").persist()
    fields = lr.field_importance_df(weights_df).limit(TOP).collect()
    seen_often = F.col("count") >= 0.001 * done["features"]["shard_rows"]["train"]
    values = weights_df.where(seen_often).orderBy(F.desc(F.abs("weight")), "field", "index")
    top_values = [r.asDict() for r in values.drop("index").limit(TOP).collect()]
    weights_df.unpersist()
    shard_rows = done["features"]["shard_rows"]
    rejected = done["ingest"]["rejected"]
    return report.ReportContent(
        results=[],
        rows=[
            ("source rows", done["ingest"]["source_rows"]),
            ("rejected rows", sum(rejected.values())),
            ("raw rows", done["features"]["raw_rows"]),
            *((f"{split} rows in the shards", n) for split, n in shard_rows.items()),
        ],
        rejected=list(rejected.items()),
        split=split_text(config),
        fingerprint=field_map.fingerprint,
        mlflow_command=f"lc-spark ui CONFIG --set workspace={config.workspace}",
        lr_loss=done["train_lr"]["loss_history"],
        top_fields=[{**row.asDict(), "kind": field_map[row["field"]].kind} for row in fields],
        top_values=top_values,
    )


def crosses_table(done: dict[str, Facts]) -> list[Table]:
    """Return the table of the crosses that were chosen by their gain, if that was asked for."""
    chosen = done["features"].get("auto_crosses")
    if not chosen:
        return []
    rows = [{**cross, "pair": " x ".join(cross["of"])} for cross in chosen]
    return [
        Table(
            "auto_crosses",
            "Crosses that were chosen",
            "Gain: log loss in nats a row that the cross takes off an additive model of all fields "
            "and the crosses above it, on sampled train rows that it was not learnt from.",
            {
                "pair": ("cross", ""),
                "gain": ("gain", ".6f"),
                "standard_error": ("standard error", ".6f"),
                "cells": ("cells", ",d"),
                "rows": ("rows judged", ",d"),
            },
            rows,
        )
    ]


def run_content(
    base: report.ReportContent,
    config: Config,
    field_map: FieldMap,
    results: list[dict[str, Any]],
    evaluated: list[Evaluated],
    done: dict[str, Facts],
    best: Metrics | None,
) -> report.ReportContent:
    """Return the report of one run of the pipeline."""
    systems = [(s.name, s.system, config.training_of(s)) for s in config.systems]
    deciles = {one.system.name: one.deciles for one in evaluated}
    return dataclasses.replace(
        base,
        results=results,
        best=None if best is None else dataclasses.asdict(best),
        tables=[
            paper.table_1(config.name, field_map, read_manifest(config)),
            paper.table_3(field_map, systems),
            *crosses_table(done),
            resources.table(done),
        ],
        roc={one.system.name: (*one.roc, one.metrics.auc) for one in evaluated},
        calibration={
            name: ([b.mean_score for b in buckets], [b.positives / b.rows for b in buckets])
            for name, buckets in deciles.items()
        },
        histories={n: history(result) for n, result in done["train_lc"]["systems"].items()},
    )


def history(result: Facts) -> dict[str, list[float]]:
    """Return the losses by epoch of a training result, as figures.loss_by_epoch takes them."""
    epochs = result["epochs"]
    return {
        "epoch": [epoch["epoch"] for epoch in epochs],
        "train": [epoch["train_loss"] for epoch in epochs],
        "valid": [epoch["valid_logloss"] for epoch in epochs],
    }


def split_text(config: Config) -> str:
    """Say in one sentence how rows became train, valid and test."""
    split = config.split
    if split.by == "date":
        return (
            f"Split by day: trained on days before {split.valid_from}, validated up to "
            f"{split.test_from}, tested on the days from then on."
        )
    return (
        f"Split at random: a seeded hash of the row id sends {split.test:.0%} of the rows to test "
        f"and {split.valid:.0%} to valid. Rows of one day are in all three."
    )
