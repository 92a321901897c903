"""One training run as plain values, and its result as a file: what driver and ranks share."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import lc_spark
from lc_spark.files import as_path, write_text
from lc_spark.systems import SystemKind
from lc_spark.training import loader, models

RESULT_FILE = "result.json"
LEARNER_FILE = "learner.safetensors"  # weights and optimisers of the kept model
STATE_FILE = "state.json"  # of a run that has begun and not ended well


@dataclass(frozen=True)
class TrainSpec:
    """What one training run needs, in values that survive JSON."""

    name: str  # of the system, as shown
    system: SystemKind
    training: dict[str, Any]  # config.Training
    shards: str  # folder
    field_map: str  # file
    output: str  # folder of the trained model
    seed: int
    lr_model: str | None = None  # folder of the LR of all train rows
    # Folders of LRs that have not seen a row's fold, or the later days; empty with other starts.
    held_out_lr: tuple[str, ...] = ()
    first_date: int | None = None  # the network trains from this day on (days since 1970)
    parent: str | None = None  # folder of the trained model to go on from, of a smaller field map
    parent_map: str | None = None  # file of that map
    keep_state: bool = False  # so that a later run can go on from this one
    watch: tuple[str, ...] = ()  # further splits to look at; they decide nothing
    tracking_uri: str | None = None
    run_id: str | None = None

    def identity(self) -> dict[str, Any]:
        """Return what a result or a checkpoint must share with this run to be of use for it."""
        files = [as_path(self.shards) / loader.MANIFEST_FILE]
        lr_folders = [*self.held_out_lr, *([self.lr_model] if self.lr_model else [])]
        files += [as_path(folder) / models.MODEL_FILE for folder in lr_folders]
        files += [as_path(self.parent) / LEARNER_FILE] if self.parent else []
        data = hashlib.sha256()
        for path in files:
            # One that is missing is reported by whoever needs it.
            data.update(path.read_bytes() if path.is_file() else b"")
        settings = {"system": self.system, "training": self.training, "watch": list(self.watch)}
        return {
            "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
            "seed": self.seed,
            "version": lc_spark.__version__,
            "data": data.hexdigest(),
        }


def finished(spec: TrainSpec) -> dict[str, Any] | None:
    """Return the result of a run that has ended well with the same settings and data, if any."""
    path = as_path(spec.output) / RESULT_FILE
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    same = content["identity"] == spec.identity() and content["model"] == _model_digest(spec)
    return dict(content["result"]) if same else None


def note_result(spec: TrainSpec, result: dict[str, Any]) -> None:
    """Write the result of a run that has ended well, whole or not at all."""
    folder = as_path(spec.output)
    content = {"identity": spec.identity(), "model": _model_digest(spec), "result": result}
    write_text(folder / RESULT_FILE, json.dumps(content, indent=1))
    (folder / STATE_FILE).unlink()


def note_state(spec: TrainSpec, error: str = "") -> None:
    """Note that a run has begun, or why it cannot be trained; what was there before is void."""
    folder = as_path(spec.output)
    (folder / RESULT_FILE).unlink(missing_ok=True)
    content = {"identity": spec.identity(), "error": error}
    write_text(folder / STATE_FILE, json.dumps(content))


def noted_error(spec: TrainSpec) -> str | None:
    """Return why a run could not be trained, "" for one that has only begun; None for neither."""
    path = as_path(spec.output) / STATE_FILE
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return str(content["error"]) if content["identity"] == spec.identity() else None


def _model_digest(spec: TrainSpec) -> str:
    path = as_path(spec.output) / models.MODEL_FILE
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def curves(entry: dict[str, Any], looks: int) -> tuple[dict[str, float], int]:
    """Return the metrics of an entry of result["epochs"], and its step: the look it was."""
    numbers = {k: float(v) for k, v in entry.items() if k not in ("epoch", "train_loss", "rows")}
    return numbers | {"epoch_train_loss": entry["train_loss"]}, round(entry["epoch"] * looks)
