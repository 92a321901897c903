"""What each stage noted when it last ran: ``workspace/stages/<name>.json``."""

import json
from typing import Any

from lc_spark.config import Config
from lc_spark.errors import LcSparkError

Facts = dict[str, Any]


def write(config: Config, stage: str, facts: Facts) -> None:
    """Note the facts of a stage."""
    folder = config.workspace_path / "stages"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(facts, indent=1, default=str)
    (folder / f"{stage}.json").write_text(text, encoding="utf-8")


def read(config: Config, stage: str) -> Facts:
    """Return the facts of a stage; raises LcSparkError when it has not run."""
    path = config.workspace_path / "stages" / f"{stage}.json"
    if not path.is_file():
        raise LcSparkError(f"The stage '{stage}' has not run in {config.workspace}: run it first.")
    facts: Facts = json.loads(path.read_text(encoding="utf-8"))
    return facts
