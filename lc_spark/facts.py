"""What each stage noted when it last ran: ``stages/<name>.json`` in the run's folder."""

import hashlib
import json
from typing import Any

import lc_spark
from lc_spark import files
from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.systems import HELD_OUT

Facts = dict[str, Any]

# The settings that a stage adds to those that the stages before it depend on.
DEPENDS_ON: dict[str, tuple[str, ...]] = {
    "ingest": ("source", "label", "fields"),
    "features": ("split", "seed", "features", "shards"),
    "train_lr": ("lr",),
    "train_lc": ("training", "systems"),
    "evaluate": ("evaluation",),
    "gate": ("gate",),
    "promote": (),
}


def write(config: Config, stage: str, facts: Facts) -> None:
    """Note the facts of a stage."""
    text = json.dumps(facts, indent=1, default=str)
    files.write_text(config.run_path / "stages" / f"{stage}.json", text)


def exists(config: Config, stage: str) -> bool:
    """Return whether the stage has run."""
    return (config.run_path / "stages" / f"{stage}.json").is_file()


def forget(config: Config, stage: str) -> None:
    """Remove the facts of a stage that is run again, and of those that build on what it makes."""
    order = list(DEPENDS_ON)
    later = order[order.index(stage) :] if stage in order else [stage]
    for name in later:
        (config.run_path / "stages" / f"{name}.json").unlink(missing_ok=True)


def read(config: Config, stage: str) -> Facts:
    """Return the facts of a stage; raises LcSparkError when it has not run."""
    path = config.run_path / "stages" / f"{stage}.json"
    if not path.is_file():
        raise LcSparkError(f"The stage '{stage}' has not run in {config.run_path}: run it first.")
    facts: Facts = json.loads(path.read_text(encoding="utf-8"))
    return facts


def settings_digest(config: Config, stage: str) -> str:
    """Return 16 hex digits over all settings that what a stage makes depends on."""
    settings: dict[str, Any] = {"version": lc_spark.__version__}
    for name, keys in DEPENDS_ON.items():
        settings |= config.model_dump(mode="json", include=set(keys))
        if name == stage:
            break
    if stage != "ingest":
        settings["ranks"] = config.most_ranks  # the number of parts is a multiple of them
    if stage == "train_lr":
        trainings = [config.training_of(system) for system in config.systems]
        pairs = {(t.start, t.days or 0) for t in trainings if t.start in HELD_OUT}
        settings["held_out"] = sorted(pairs)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
