"""Turns two models and the same test rows into a verdict: may the new one replace the champion?"""

from collections.abc import Mapping
from dataclasses import dataclass

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from lc_spark import facts, ingest, metrics, registry, score, tables, tracking
from lc_spark.config import Config
from lc_spark.daily_settings import Gate
from lc_spark.facts import Facts
from lc_spark.features.shards import read_manifest
from lc_spark.metrics import Metrics

COMPARED = ("auc", "logloss", "calibration")


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a version; against is empty when it may be the champion."""

    version: str
    champion: str  # the version that it was compared with; empty if there was none
    against: tuple[str, ...]
    new: Metrics
    old: Metrics | None

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        other = f"version {self.champion}" if self.champion else "no champion yet"
        on = f"on {self.new.rows:,} rows, {self.new.positives:,} positive"
        if self.against:
            return f"version {self.version} stays challenger ({other}, {on}): " + "; ".join(
                self.against
            )
        return f"version {self.version} may be champion ({other}, {on}): {_numbers(self)}"

    def tags(self) -> dict[str, str]:
        """Return the evidence as tags of the version."""
        found = {"gate": "failed" if self.against else "passed", "gate_says": self.sentence}
        found |= {"gate_champion": self.champion, "gate_rows": str(self.new.rows)}
        for prefix, one in (("gate_", self.new), ("gate_champion_", self.old)):
            if one is not None:
                found |= {f"{prefix}{key}": repr(getattr(one, key)) for key in COMPARED}
        return found


def _numbers(verdict: Verdict) -> str:
    pairs = [
        f"{key} {getattr(verdict.new, key):.4f}"
        + (f" against {getattr(verdict.old, key):.4f}" if verdict.old else "")
        for key in COMPARED
    ]
    return ", ".join(pairs)


def reasons_against(gate: Gate, new: Metrics, old: Metrics | None) -> tuple[str, ...]:
    """Return why a model with the metrics `new` may not replace one with `old`; empty: it may."""
    against = []
    if new.rows < gate.min_rows:
        against.append(f"{new.rows:,} test rows, gate.min_rows is {gate.min_rows:,}")
    if new.positives < gate.min_positives:
        against.append(f"{new.positives:,} positives, gate.min_positives is {gate.min_positives:,}")
    if old is None:
        return tuple(against)
    worse = {
        "auc": (old.auc - new.auc, gate.auc),
        "logloss": (new.logloss - old.logloss, gate.logloss),
        "calibration": (abs(new.calibration - 1) - abs(old.calibration - 1), gate.calibration),
    }
    for key, (by, margin) in worse.items():
        if not by <= margin:  # NaN is against it too
            against.append(
                f"{key} {getattr(new, key):.4f} is worse than {getattr(old, key):.4f} by {by:.4f}, "
                f"gate.{key} is {margin:g}"
            )
    return tuple(against)


def compare(spark: SparkSession, config: Config) -> Verdict:
    """Score the run's test rows, raw, with its model and with the champion, and judge.

    The model is the one that the run's evaluation registered. A champion of the same name and
    version is compared with itself, and passes.
    """
    version = str(facts.read(config, "evaluate")["registered"]).rpartition("/")[2]
    champion = registry.with_alias(config, registry.CHAMPION)
    compared = {"challenger": version} | ({"champion": champion.version} if champion else {})
    rows_df = _test_rows(spark, config)
    parts = [
        score.raw_scores_df(
            rows_df, registry.download(config, f"models:/{config.model_name}/{number}"), ("label",)
        ).withColumn("system", F.lit(who))
        for who, number in compared.items()
    ]
    scores_df = parts[0].unionByName(parts[-1]) if champion else parts[0]
    scores_df = scores_df.persist()  # read twice, and small beside the rows
    found = metrics.evaluate_systems(scores_df)
    scores_df.unpersist()
    new, old = found["challenger"], found.get("champion")
    against = reasons_against(config.gate, new, old)
    if champion is not None:
        against += out_of_date(str(config.day or "all"), champion.tags.get("day", "all"))
    mine = next(each for each in registry.versions(config) if each.version == version)
    against += rolled_back(mine.tags)
    return Verdict(version, champion.version if champion else "", against, new, old)


def out_of_date(day: str, champion_day: str) -> tuple[str, ...]:
    """Return why the model of a day that is run again may not replace a later day's."""
    if "all" in (day, champion_day) or day >= champion_day:
        return ()
    return (f"the champion is of a later day, {champion_day}",)


def rolled_back(tags: Mapping[str, str]) -> tuple[str, ...]:
    """Return why a version with these tags may not be promoted: only a person takes that back."""
    if "rolled_back_at" not in tags:
        return ()
    return (f"it was rolled back ({tags['rolled_back_why']}): 'lc-spark promote' takes that back",)


def _test_rows(spark: SparkSession, config: Config) -> DataFrame:
    """Return the raw rows of the run's test split."""
    version = read_manifest(config)["raw_version"]
    raw_df = tables.read_with_places(spark, config, "raw", version)
    split_df = ingest.rows_of_run(raw_df, config).withColumn("split", ingest.split_column(config))
    return split_df.where(F.col("split") == "test")


def gate_stage(spark: SparkSession, config: Config, parent: str) -> Facts:
    """Test rows, the run's model and the champion -> a verdict, in the version's tags."""
    with tracking.stage(config, parent, "gate") as run:
        verdict = compare(spark, config)
        registry.note(config, verdict.version, verdict.tags())
        run.set_tags(verdict.tags())
        run.log_metrics(verdict.new.as_floats())
        if verdict.old is not None:
            old = verdict.old.as_floats()
            run.log_metrics({f"champion_{key}": value for key, value in old.items()})
        return {
            "version": verdict.version,
            "passed": not verdict.against,
            "says": verdict.sentence,
            "run_id": run.run_id,
            "summary": verdict.sentence,
        }


def promote_stage(_spark: SparkSession, config: Config, parent: str) -> Facts:
    """Make the run's model the champion, where the gate allows it; else say why not."""
    verdict = facts.read(config, "gate")
    with tracking.stage(config, parent, "promote") as run:
        if verdict["passed"]:
            registry.promote(config, verdict["version"], f"gate: {verdict['says']}")
        champion = registry.with_alias(config, registry.CHAMPION)
        now = champion.version if champion else ""
        run.set_tags({"champion": now, "says": verdict["says"]})
        standing = f"{config.model_name} version {now} is the champion" if now else "no champion"
        return {
            "champion": now,
            "promoted": verdict["passed"],
            "run_id": run.run_id,
            "summary": f"{standing}; {verdict['says']}",
        }
