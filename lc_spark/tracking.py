"""Turns what the stages measured and made into MLflow runs, figures and tables.

With registry.py the only file that imports mlflow. One parent run a pipeline run, a child run a
stage.
"""

import contextlib
import functools
import getpass
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# MLflow reports usage to its makers from the first import on unless told not to.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = os.environ.get("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"  # for a handful of local files

import mlflow
import pandas as pd
import requests
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from lc_spark.config import Config
from lc_spark.errors import LcSparkError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

# Creating the tables of a new store is 50 lines of INFO that nobody asked for.
for _name in ("alembic.runtime.migration", "alembic.runtime.plugins"):
    logging.getLogger(_name).setLevel(logging.WARNING)
# Nor the stack trace of an error that it raises as well.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

BATCH = 100  # parameters in one call: MLflow's limit


@dataclass(frozen=True)
class StageRun:
    """A run that is being written to, from any process."""

    uri: str
    run_id: str

    def log_params(self, params: dict[str, Any]) -> None:
        """Log parameters; one that was logged keeps its value, another value is an error."""
        entries = [Param(key, str(value)) for key, value in params.items()]
        for start in range(0, len(entries), BATCH):
            client_of(self.uri).log_batch(self.run_id, params=entries[start : start + BATCH])

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of one step (default 0)."""
        now = int(time.time() * 1000)
        entries = [Metric(key, float(value), now, step or 0) for key, value in metrics.items()]
        client_of(self.uri).log_batch(self.run_id, metrics=entries)

    def set_tags(self, tags: dict[str, str]) -> None:
        """Set tags, over older ones of the same key."""
        for key, value in tags.items():
            client_of(self.uri).set_tag(self.run_id, key, value)

    def log_figure(self, figure: "Figure", name: str) -> None:
        """Store a figure; the format is the name's suffix (svg or png)."""
        client_of(self.uri).log_figure(self.run_id, figure, name)

    def log_text(self, text: str, name: str) -> None:
        """Store a text file."""
        client_of(self.uri).log_text(self.run_id, text, name)

    def log_table(self, table: pd.DataFrame, name: str) -> None:
        """Store a table that the MLflow pages can show; the name ends in .json."""
        client_of(self.uri).log_table(self.run_id, table, name)


def uri_of(config: Config) -> str:
    """Return where runs are kept: tracking.uri, or the SQLite store of the workspace."""
    return config.tracking.uri or f"sqlite:///{config.workspace_path / 'mlflow.db'}"


@functools.cache
def client_of(uri: str) -> mlflow.MlflowClient:
    """Return the client of a store or server; raises LcSparkError when no server answers."""
    if uri.startswith(("http://", "https://")):
        try:  # MLflow itself would try for minutes
            requests.get(uri, timeout=10)
        except requests.RequestException as error:
            raise LcSparkError(
                f"No MLflow server answers at {uri} ({type(error).__name__}): start it, or set "
                "tracking.uri to the right address, or leave it out to use the workspace's store."
            ) from error
    return mlflow.MlflowClient(uri, uri)


def _artifact_folder(config: Config) -> Path:
    """Return where the artifacts of an SQLite store lie: MLflow knows not all that Spark does."""
    workspace, store = config.workspace_path, uri_of(config).removeprefix("sqlite:///")
    folder = workspace if isinstance(workspace, Path) else Path(store).resolve().parent
    return folder / "mlartifacts"


def _experiment_id(config: Config) -> str:
    uri, name = uri_of(config), config.tracking.experiment
    location = None  # a server says itself where artifacts lie
    if uri.startswith("sqlite:"):  # a database file knows only the current folder
        folder = _artifact_folder(config)
        folder.parent.mkdir(parents=True, exist_ok=True)
        location = folder.as_uri()
    try:
        found = client_of(uri).get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "active":
            return str(found.experiment_id)
        return client_of(uri).create_experiment(name, location)
    except (MlflowException, SQLAlchemyError) as error:
        why = str(error).splitlines()[0]
        raise LcSparkError(f"The MLflow store {uri} cannot be used: {why}") from error


def address_of(config: Config, run_id: str) -> str:
    """Return where a run can be looked at: its page on the server, or the store and its id."""
    uri = uri_of(config)
    if not uri.startswith(("http://", "https://")):
        return f"{run_id} in {uri}"
    experiment_id = client_of(uri).get_run(run_id).info.experiment_id
    return f"{uri}/#/experiments/{experiment_id}/runs/{run_id}"


def start_pipeline(config: Config, tags: dict[str, str]) -> str:
    """Start the parent run of a pipeline run and return its id; it is left running.

    Logs the tags, the git commit of the current folder, the settings as config.yaml, and the
    common ones as parameters. Raises LcSparkError when the store or server cannot be used.
    """
    experiment_id = _experiment_id(config)
    run_tags = {"mlflow.user": getpass.getuser(), "seed": str(config.seed), **_git_tags(), **tags}
    client = client_of(uri_of(config))
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
    client_of(uri_of(config)).set_terminated(run_id, status)


def fail_run(config: Config, run_id: str) -> None:
    """End a run as FAILED while an error is on its way, which MLflow's own must not hide."""
    try:
        end_run(config, run_id, "FAILED")
    except (MlflowException, SQLAlchemyError, LcSparkError) as error:
        log.warning("MLflow run %s stays open: %s", run_id, str(error).splitlines()[0])


@contextlib.contextmanager
def stage(config: Config, parent_run_id: str, name: str) -> Iterator[StageRun]:
    """Open a child run for one stage; it ends as FAILED when the block raises."""
    run = start_child(config, parent_run_id, name)
    try:
        yield run
    except BaseException:
        fail_run(config, run.run_id)
        raise
    end_run(config, run.run_id, "FINISHED")


def start_child(config: Config, parent_run_id: str, name: str) -> StageRun:
    """Start a child run and leave it running."""
    uri = uri_of(config)
    client = client_of(uri)
    experiment_id = client.get_run(parent_run_id).info.experiment_id
    tags = {"mlflow.parentRunId": parent_run_id, "mlflow.user": getpass.getuser(), "stage": name}
    run_id = str(client.create_run(experiment_id, tags=tags, run_name=name).info.run_id)
    return StageRun(uri, run_id)


def append_to(uri: str, run_id: str) -> StageRun:
    """Write to a run that another process started and will end."""
    return StageRun(uri, run_id)


def check_port(port: int) -> None:
    """Raise LcSparkError when another program listens on a port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            message = f"Port {port} is in use on this machine: choose another one with --port."
            raise LcSparkError(message) from error


def serve_ui(config: Config, port: int) -> None:
    """Become `mlflow server` on 127.0.0.1 over the workspace's store; does not return.

    Raises LcSparkError when the port is taken or the runs are on a server of their own.
    """
    uri = uri_of(config)
    if uri.startswith(("http://", "https://")):
        raise LcSparkError(f"The runs are kept by the server at {uri}: open it in the browser.")
    check_port(port)
    page = f"experiments/{_experiment_id(config)}/runs?workflowType=machine_learning"
    log.info("The runs are at http://127.0.0.1:%d/#/%s", port, page)
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # three more processes, 1 GB
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--backend-store-uri", uri]
    command += ["--artifacts-destination", str(_artifact_folder(config))]
    os.execv(sys.executable, command)
