"""Turns what the stages measured and made into MLflow runs, figures, tables and models.

The only file that imports mlflow. One parent run a pipeline run, a child run a stage; the
registered model is one pyfunc that takes raw rows.
"""

import contextlib
import functools
import getpass
import importlib.metadata
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# MLflow reports usage to its makers from the first import on unless told not to.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = os.environ.get("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"  # for a handful of local files

import mlflow
import numpy as np
import pandas as pd
import requests
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.models import set_model as set_model
from mlflow.pyfunc.model import PythonModel
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import AnyType
from numpy.typing import NDArray
from sqlalchemy.exc import SQLAlchemyError

from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.field_map import FieldMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

# Creating the tables of a new store is 50 lines of INFO that nobody asked for.
for _name in ("alembic.runtime.migration", "alembic.runtime.plugins", "mlflow.store.db.utils"):
    logging.getLogger(_name).setLevel(logging.WARNING)

CHALLENGER, CHAMPION = "challenger", "champion"
BATCH, DESCRIPTION_LENGTH = 100, 5000  # parameters in one call, characters: MLflow's limits
# What scoring imports; everything else in the environment only makes models.
SCORING_PACKAGES = (
    "mlflow", "numpy", "pandas", "pyarrow", "pydantic", "pyyaml", "safetensors", "torch", "xxhash",
)  # fmt: skip


@dataclass(frozen=True)
class StageRun:
    """A run that is being written to, from any process."""

    uri: str
    run_id: str

    def log_params(self, params: dict[str, Any]) -> None:
        """Log parameters; one that was logged keeps its value, another value is an error."""
        entries = [Param(key, str(value)) for key, value in params.items()]
        for start in range(0, len(entries), BATCH):
            _client(self.uri).log_batch(self.run_id, params=entries[start : start + BATCH])

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of one step (default 0)."""
        now = int(time.time() * 1000)
        entries = [Metric(key, float(value), now, step or 0) for key, value in metrics.items()]
        _client(self.uri).log_batch(self.run_id, metrics=entries)

    def set_tags(self, tags: dict[str, str]) -> None:
        """Set tags, over older ones of the same key."""
        for key, value in tags.items():
            _client(self.uri).set_tag(self.run_id, key, value)

    def log_figure(self, figure: "Figure", name: str) -> None:
        """Store a figure; the format is the name's suffix (svg or png)."""
        _client(self.uri).log_figure(self.run_id, figure, name)

    def log_text(self, text: str, name: str) -> None:
        """Store a text file."""
        _client(self.uri).log_text(self.run_id, text, name)

    def log_table(self, table: pd.DataFrame, name: str) -> None:
        """Store a table that the MLflow pages can show; the name ends in .json."""
        _client(self.uri).log_table(self.run_id, table, name)


def uri_of(config: Config) -> str:
    """Return where runs are kept: tracking.uri, or the SQLite store of the workspace."""
    return config.tracking.uri or f"sqlite:///{config.workspace_path / 'mlflow.db'}"


@functools.cache
def _client(uri: str) -> mlflow.MlflowClient:
    if uri.startswith(("http://", "https://")):
        try:  # MLflow itself would try for minutes
            requests.get(uri, timeout=10)
        except requests.RequestException as error:
            raise LcSparkError(
                f"No MLflow server answers at {uri} ({type(error).__name__}): start it, or set "
                "tracking.uri to the right address, or leave it out to use the workspace's store."
            ) from error
    return mlflow.MlflowClient(uri, uri)


def _experiment_id(config: Config) -> str:
    uri, name = uri_of(config), config.tracking.experiment
    config.workspace_path.mkdir(parents=True, exist_ok=True)
    # A server says itself where artifacts lie; a database file knows only the current folder.
    local = uri.startswith("sqlite:")
    location = (config.workspace_path / "mlartifacts").as_uri() if local else None
    try:
        found = _client(uri).get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "active":
            return str(found.experiment_id)
        return _client(uri).create_experiment(name, location)
    except (MlflowException, SQLAlchemyError) as error:
        why = str(error).splitlines()[0]
        raise LcSparkError(f"The MLflow store {uri} cannot be used: {why}") from error


def start_pipeline(config: Config, tags: dict[str, str]) -> str:
    """Start the parent run of a pipeline run and return its id; it is left running.

    Logs the tags, the git commit of the current folder, the settings as config.yaml, and the
    common ones as parameters. Raises LcSparkError when the store or server cannot be used.
    """
    experiment_id = _experiment_id(config)
    run_tags = {"mlflow.user": getpass.getuser(), "seed": str(config.seed), **_git_tags(), **tags}
    client = _client(uri_of(config))
    run_id = str(client.create_run(experiment_id, tags=run_tags, run_name=config.name).info.run_id)
    settings = config.model_dump(mode="json")
    client.log_dict(run_id, settings, "config.yaml")
    sections = ("split", "shards", "lr", "training")
    params = {f"{name}.{key}": v for name in sections for key, v in settings[name].items()}
    params |= {"fields": len(config.fields), "config_digest": config.digest()}
    params |= {"systems": ", ".join(system.name for system in config.systems)}
    StageRun(uri_of(config), run_id).log_params(params)
    return run_id


def _git_tags() -> dict[str, str]:
    """Return the commit of the repository around the current folder, or nothing."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"mlflow.source.git.commit": said}


def end_run(config: Config, run_id: str, status: str) -> None:
    """End a run as FINISHED or FAILED."""
    _client(uri_of(config)).set_terminated(run_id, status)


@contextlib.contextmanager
def stage(config: Config, parent_run_id: str, name: str) -> Iterator[StageRun]:
    """Open a child run for one stage; it ends as FAILED when the block raises."""
    run = start_child(config, parent_run_id, name)
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    finally:
        end_run(config, run.run_id, status)


def start_child(config: Config, parent_run_id: str, name: str) -> StageRun:
    """Start a child run and leave it running."""
    uri = uri_of(config)
    client = _client(uri)
    experiment_id = client.get_run(parent_run_id).info.experiment_id
    tags = {"mlflow.parentRunId": parent_run_id, "mlflow.user": getpass.getuser(), "stage": name}
    run_id = str(client.create_run(experiment_id, tags=tags, run_name=name).info.run_id)
    return StageRun(uri, run_id)


def append_to(uri: str, run_id: str) -> StageRun:
    """Write to a run that another process started and will end."""
    return StageRun(uri, run_id)


class ClickModel(PythonModel):
    """The registered model: raw rows in, scores out."""

    def load_context(self, context: Any) -> None:
        """Read the bundle: field map, vocabulary and weights; nothing is unpickled."""
        from lc_spark.training.scorer import Scorer

        self.scorer = Scorer(Path(context.artifacts["bundle"]))

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> NDArray[np.float64]:
        """Return float64 scores [n] of n raw rows; a column that is not there counts as missing.

        Raises LcSparkError when not one of the model's raw columns is there.
        """
        known = self.scorer.field_map.raw_columns
        if not set(known) & set(model_input.columns):
            raise LcSparkError(f"The rows have none of the model's columns: {', '.join(known)}.")
        scores: NDArray[np.float64] = self.scorer.score_pandas(model_input)
        return scores


def _log_model(run: StageRun, bundle: Path, field_map: FieldMap) -> Any:
    # MLflow checks declared types before the model sees a row, and would refuse an integer column
    # that pandas made float because a value is missing: the metadata and description tell types.
    columns = [ColSpec(AnyType(), name, required=False) for name in field_map.raw_columns]  # type: ignore[no-untyped-call]
    pinned = [f"{p}=={importlib.metadata.version(p).split('+')[0]}" for p in SCORING_PACKAGES]
    package = Path(__file__).parent
    client = _client(run.uri)
    experiment_id = client.get_run(run.run_id).info.experiment_id
    logged = client.create_logged_model(experiment_id, bundle.name, run.run_id)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*input example was not provided")
        return Model.log(
            artifact_path=None,
            flavor=mlflow.pyfunc,
            model_id=logged.model_id,
            run_id=run.run_id,
            metadata={"raw_columns": field_map.raw_columns, "fingerprint": field_map.fingerprint},
            python_model=str(package / "model_code.py"),
            artifacts={"bundle": str(bundle)},
            code_paths=[str(package)],
            pip_requirements=pinned,
            signature=ModelSignature(Schema([*columns]), Schema([ColSpec(DataType.double)])),
        )


def register(config: Config, run: StageRun, bundle: Path, metrics: dict[str, float]) -> str:
    """Log a bundle as a model on raw rows, register it, and return its version.

    Every new version becomes `challenger`. `champion` moves to it when there is none yet, or when
    metrics["logloss"] is not above the log loss with which the champion was registered.
    """
    client, name = _client(run.uri), config.model_name
    field_map = FieldMap.read(bundle / "field_map.json")
    tags = {"fingerprint": field_map.fingerprint, "run_id": run.run_id}
    tags |= {key: repr(float(value)) for key, value in metrics.items()}
    mlflow.set_tracking_uri(run.uri)  # what follows also makes clients of its own
    model = _log_model(run, bundle, field_map)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    columns = ", ".join(f"`{column}` {kind}" for column, kind in field_map.raw_columns.items())
    about = f"{bundle.name} on raw rows with these columns: {columns}"[:DESCRIPTION_LENGTH]
    made = client.create_model_version(
        name, model.model_uri, run.run_id, tags, description=about, model_id=model.model_id
    )
    version = str(made.version)
    client.set_registered_model_alias(name, CHALLENGER, version)
    _gate(client, name, version, metrics["logloss"])
    return version


def _gate(client: mlflow.MlflowClient, name: str, version: str, logloss: float) -> None:
    old = client.get_registered_model(name).aliases.get(CHAMPION)
    tags = client.get_model_version(name, old).tags if old else {"logloss": "inf"}
    to_beat = float(tags.get("logloss", "nan"))
    moves = logloss <= to_beat
    if moves:
        client.set_registered_model_alias(name, CHAMPION, version)
    text = "%s version %s is %s: log loss %.5f, that of the champion before (%s) %.5f"
    which = CHAMPION if moves else CHALLENGER
    log.info(text, name, version, which, logloss, f"version {old}" if old else "none", to_beat)


def download(config: Config, model_uri: str) -> Path:
    """Return a local bundle folder of models:/NAME@ALIAS or models:/NAME/VERSION.

    Kept in the workspace by model id, so that a version is fetched once. Raises LcSparkError when
    there is no such model.
    """
    uri = uri_of(config)
    name, at, alias = model_uri.removeprefix("models:/").partition("@")
    client = _client(uri)
    try:
        if not at:
            name, _, number = name.partition("/")
            found = client.get_model_version(name, number)
        else:
            found = client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        raise LcSparkError(
            f"There is no registered model '{model_uri}' in {uri}: write it as "
            "models:/NAME@champion or models:/NAME/VERSION, and train one first."
        ) from error
    # The source ends in an id of its own: a version number may come back in another store.
    folder = config.workspace_path / "models" / "registered" / str(found.source).rsplit("/", 1)[-1]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(uri)
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            mlflow.artifacts.download_artifacts(found.source, dst_path=f"{partial}/model")
            Path(partial, "model").rename(folder)
    flavor = Model.load(str(folder)).flavors["python_function"]
    return Path(folder / flavor["artifacts"]["bundle"]["path"])


def version_of(config: Config, model_uri: str) -> str:
    """Return models:/NAME/VERSION of models:/NAME@ALIAS, as it stands now."""
    name, _, alias = model_uri.removeprefix("models:/").partition("@")
    try:
        found = _client(uri_of(config)).get_model_version_by_alias(name, alias)
    except MlflowException as error:
        raise LcSparkError(
            f"There is no registered model '{model_uri}': train and evaluate one first."
        ) from error
    return f"models:/{name}/{found.version}"


def serve_ui(config: Config, port: int) -> None:
    """Become `mlflow server` on 127.0.0.1 over the workspace's store; does not return.

    Raises LcSparkError when the port is taken or the runs are on a server of their own.
    """
    uri = uri_of(config)
    if uri.startswith(("http://", "https://")):
        raise LcSparkError(f"The runs are kept by the server at {uri}: open it in the browser.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            message = f"Port {port} is in use on this machine: choose another one with --port."
            raise LcSparkError(message) from error
    page = f"experiments/{_experiment_id(config)}/runs?workflowType=machine_learning"
    log.info("The runs are at http://127.0.0.1:%d/#/%s", port, page)
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # three more processes, 1 GB
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--backend-store-uri", uri]
    command += ["--artifacts-destination", str(config.workspace_path / "mlartifacts")]
    os.execv(sys.executable, command)
