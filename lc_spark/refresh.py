"""Finds the run that a day's run goes on from, and what of it there is to take over.

A run goes on from the last earlier day whose model the gate let through, so that a bad day harms
no later one.
"""

import dataclasses
import datetime
import logging
from dataclasses import dataclass

from pyspark.sql import SparkSession

from lc_spark import facts, files, registry, tables
from lc_spark.config import Config
from lc_spark.features.fit import Grown
from lc_spark.field_map import FieldMap
from lc_spark.files import AnyPath

log = logging.getLogger("lc_spark")


@dataclass(frozen=True)
class Parent:
    """An earlier run: its day (ISO), the version it registered, its field map's fingerprint."""

    day: str
    version: str
    fingerprint: str

    def path(self, config: Config) -> AnyPath:
        """Return the folder of the run."""
        return config.for_day(datetime.date.fromisoformat(self.day)).run_path


def find_parent(config: Config) -> Parent | None:
    """Return the run that this one goes on from; None where it starts from scratch.

    It is the last day before this one whose version was promoted and not rolled back. Its files
    must still be those of that version: after a run that the gate stopped they are another model's.
    """
    if config.refresh.mode == "scratch":
        return None
    today = str(config.day)
    earlier = [v for v in registry.versions(config) if v.was_promoted and v.tags["day"] < today]
    for known in sorted(earlier, key=lambda v: (v.tags["day"], int(v.version)), reverse=True):
        parent = Parent(known.tags["day"], known.version, known.tags["fingerprint"])
        then = config.for_day(datetime.date.fromisoformat(parent.day))
        if facts.exists(then, "evaluate"):
            registered = facts.read(then, "evaluate")["registered"]
            if registered == f"models:/{config.model_name}/{parent.version}":
                log.info("refresh: goes on from %s, version %s", parent.day, parent.version)
                return parent
        log.warning(
            "refresh: version %s of %s was promoted, but %s no longer holds it",
            parent.version,
            parent.day,
            parent.path(config),
        )
    log.warning("refresh: there is no earlier run to go on from: this one starts from scratch")
    return None


def parent_of(config: Config) -> Parent | None:
    """Return the run that the features of this one grew from, as its features stage noted."""
    if config.refresh.mode == "scratch":
        return None
    noted = facts.read(config, "features")["parent"]
    return None if noted is None else Parent(**noted)


def grown_from(spark: SparkSession, config: Config, parent: Parent) -> Grown:
    """Return what the parent's features stage had learnt."""
    then = config.for_day(datetime.date.fromisoformat(parent.day))
    field_map = FieldMap.read(then.run_path / "field_map.json")
    version = facts.read(then, "features")["vocabulary_version"]
    return Grown(field_map, tables.read(spark, config, "vocabulary", version))


def first_train_date(config: Config, parent: Parent | None) -> datetime.date | None:
    """Return the first day that networks train on; None for all of the window."""
    if parent is None or config.refresh.train_on == "window":
        return None
    return datetime.date.fromisoformat(parent.day) + datetime.timedelta(days=1)


def tidy(config: Config) -> None:
    """Remove what no later run needs: shards of earlier days, and days that left the window."""
    if config.split.by != "window" or config.day is None:
        return
    oldest = config.day - datetime.timedelta(days=config.split.days)
    for folder in files.children(config.workspace_path / "days", "*"):
        day = folder.name
        if day < oldest.isoformat():
            files.remove(folder)
        elif day < config.day.isoformat():
            files.remove(folder / "shards")


def as_facts(parent: Parent | None) -> dict[str, str] | None:
    """Return a parent as `parent_of` reads it."""
    return None if parent is None else dataclasses.asdict(parent)
