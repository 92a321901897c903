"""The stages ingest and features: each opens a child of one MLflow run and returns its facts."""

import dataclasses
import datetime
import json
import logging

import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from lc_spark import files, ingest, refresh, tables, tracking
from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.facts import Facts
from lc_spark.features import drift
from lc_spark.features.auto_crosses import ChosenCross, choose_crosses
from lc_spark.features.fit import fit_features
from lc_spark.features.levels import write_levels
from lc_spark.features.shards import part_files, write_shards

log = logging.getLogger("lc_spark")


def ingest_stage(spark: SparkSession, config: Config, parent: str) -> Facts:
    """Source -> Delta raw and rejected."""
    with tracking.stage(config, parent, "ingest") as run:
        made = ingest.ingest(spark, config, config.day, ingest.days_to_load(spark, config))
        missing = ingest.missing_days(spark, config)
        if missing:
            log.warning("ingest: 'raw' has no rows of %s", ", ".join(missing))
        counts = {"source_rows": made.source_rows, "raw_rows": made.raw_rows}
        run.log_metrics(counts | {"rejected_rows": sum(made.rejected.values())})
        run.set_tags({"raw_version": str(made.raw_version), "date": str(config.day or "all")})
        run.log_text(json.dumps(made.rejected, indent=1), "rejected.json")
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in made.rejected.items()) or "none"
        summary = (
            f"{made.source_rows:,} source rows = {made.raw_rows:,} raw + "
            f"{sum(made.rejected.values()):,} rejected ({reasons})"
        )
        return {**vars(made), "missing_days": missing, "run_id": run.run_id, "summary": summary}


def features_stage(spark: SparkSession, config: Config, parent: str) -> Facts:
    """Delta raw -> field map, Delta vocabulary, shards with a manifest."""
    with tracking.stage(config, parent, "features") as run:
        raw_version = tables.version(spark, config, "raw")
        raw_df = tables.read_with_places(spark, config, "raw", raw_version)
        raw_df = ingest.rows_of_run(raw_df, config)
        split_df = raw_df.withColumn("split", ingest.split_column(config))
        train_df = split_df.where(F.col("split") == "train")
        crosses = _auto_crosses(train_df, config, run)
        fields = (*config.fields, *(chosen.cross for chosen in crosses))
        refresh.tidy(config)
        before = refresh.find_parent(config)
        old = None if before is None else refresh.grown_from(spark, config, before)
        recent_df = _recent(train_df, config) if old is None else None
        fitted = fit_features(train_df, fields, config.seed, old, recent_df)
        field_map, vocabulary = fitted.field_map, fitted.vocabulary
        vocabulary_version = write_levels(spark, fitted.levels, config)
        del fitted  # the texts of all values
        field_map.write(config.run_path / "field_map.json")
        vocabulary.write(config.run_path / "vocabulary.parquet")
        manifest = write_shards(raw_df, field_map, vocabulary, config, raw_version)
        split_rows = {r["split"]: r["count"] for r in split_df.groupBy("split").count().collect()}
        shard_rows = {split: part["rows"] for split, part in manifest["splits"].items()}
        if split_rows != shard_rows:
            raise LcSparkError(
                f"raw has {split_rows} rows, the shards {shard_rows}: 'raw' changed while they "
                "were written. Run the stage 'features' again."
            )
        train_parts = part_files(config.run_path / "shards", "train")
        train_counts = drift.count_shards(spark, train_parts, field_map)
        files.write_text(config.run_path / drift.TRAIN_COUNTS, train_counts.to_json())
        run.log_params({"features": field_map.d, "fields": len(field_map.fields)})
        run.log_metrics({f"{split}_rows": n for split, n in shard_rows.items()})
        run.log_text(field_map.to_json(), "field_map.json")
        run.set_tags(
            {
                "fingerprint": field_map.fingerprint,
                "raw_version": str(raw_version),
                "vocabulary_version": str(vocabulary_version),
                "parent_fingerprint": field_map.parent,
                "parent_day": before.day if before else "",
            }
        )
        parts = " + ".join(f"{shard_rows[s]:,} {s}" for s in ("train", "valid", "test"))
        return {
            "raw_rows": sum(split_rows.values()),
            "shard_rows": shard_rows,
            "features": field_map.d,
            "fields": len(field_map.fields),
            "fingerprint": field_map.fingerprint,
            "parent": refresh.as_facts(before),
            "vocabulary_version": vocabulary_version,
            "auto_crosses": [dataclasses.asdict(chosen) for chosen in crosses],
            "run_id": run.run_id,
            "summary": f"{sum(split_rows.values()):,} raw rows = {parts} in the shards; "
            f"{len(field_map.fields)} fields, {field_map.d:,} features",
        }


def _recent(train_df: DataFrame, config: Config) -> DataFrame | None:
    """Return the train rows in which a value must occur, or None where values do not expire."""
    days = config.refresh.expire_days
    if days is None:
        return None
    first = ingest.run_day(config) - datetime.timedelta(days=days - 1)
    return train_df.where(F.col("date") >= F.lit(first))


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
