"""Runs, artifacts and models in the workspace's SQLite store and on a real MLflow server."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import requests
import torch
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from lc_spark import figures, registry, tracking
from lc_spark.config import Config
from lc_spark.encoder import Vocabulary
from lc_spark.errors import LcSparkError
from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.hashing import hash_text
from lc_spark.training import models
from lc_spark.training.scorer import Scorer


def make_config(workspace: Path, **changes: Any) -> Config:
    settings = {
        "name": "toy",
        "workspace": str(workspace),
        "source": {"path": "rows.parquet"},
        "label": "y",
        "split": {"by": "hash"},
        "fields": [{"name": "color", "kind": "categorical"}],
        "systems": ["lr", "lc_dnn"],
    }
    return Config.model_validate({**settings, **changes})


def make_bundle(folder: Path) -> Path:
    """Write an LR over a string, an integer, a continuous and a multivalued column."""
    entries = {}
    for name, values in (("color", ("red", "blue")), ("shop", ("7", "8")), ("tags", ("x", "y"))):
        hashes = np.array([hash_text(value) for value in values], np.int64)
        order = np.argsort(hashes)
        entries[name] = (hashes[order], np.arange(2, 4, dtype=np.int32)[order])
    vocabulary = Vocabulary(entries)
    infos = (
        FieldInfo("color", "categorical", 4, column="color", column_type="string"),
        FieldInfo("shop", "categorical", 4, column="shop", column_type="bigint"),
        FieldInfo("price", "continuous", 2, column="price", column_type="double", high=100.0),
        FieldInfo(
            "tags", "multivalued", 4, column="tags", column_type="array<string>", max_values=2
        ),
    )
    field_map = FieldMap(infos)
    weights = np.linspace(-1, 1, field_map.d)
    models.save(models.Lr.from_weights(weights, -0.25), folder, field_map.fingerprint, {})
    field_map.write(folder / "field_map.json")
    pq.write_table(vocabulary.to_arrow(), folder / "vocabulary.parquet")
    return folder


RAW = pd.DataFrame(
    {
        "color": ["red", "blue", None, "unseen", ""],
        "shop": [7, 8, 7, 9, 8],
        "price": [1.5, np.nan, 3.0, 1e9, 0.0],
        "tags": [["x"], [], None, ["x", "y"], ["new"]],
    }
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process that leads a group of its own, so that its workers end with it."""
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env=environment,
            start_new_session=True,
        )


def wait_for(uri: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if requests.get(f"{uri}/health", timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.3)
    pytest.fail(f"The server did not come up:\n{log.read_text()}")


def stop(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    process = start(command, folder / "log")
    try:
        wait_for(f"http://127.0.0.1:{port}", process, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


@pytest.fixture(params=["sqlite", pytest.param("server", marks=pytest.mark.slow)])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Config:
    """Settings whose runs go to the workspace's own store, then to a server."""
    uri = request.getfixturevalue("server") if request.param == "server" else None
    return make_config(tmp_path / "workspace", tracking={"uri": uri, "model_name": tmp_path.name})


def run_of(config: Config, run_id: str) -> Run:
    return mlflow.MlflowClient(tracking.uri_of(config)).get_run(run_id)


def files_of(config: Config, run_id: str) -> dict[str, Path]:
    uri = tracking.uri_of(config)
    folder = Path(mlflow.artifacts.download_artifacts(run_id=run_id, tracking_uri=uri))
    return {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}


def test_the_store_is_in_the_workspace_unless_a_uri_is_given(tmp_path: Path) -> None:
    assert tracking.uri_of(make_config(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    elsewhere = make_config(tmp_path, tracking={"uri": "http://tracking:5000"})
    assert tracking.uri_of(elsewhere) == "http://tracking:5000"


def test_a_pipeline_run_has_one_child_a_stage(config: Config) -> None:
    parent = tracking.start_pipeline(config, {"fingerprint": "abc", "raw_version": "3"})
    with tracking.stage(config, parent, "train_lc") as run:
        assert run_of(config, run.run_id).info.status == "RUNNING"
        run.log_params({"epochs": 3, "hidden": (256, 128)})
        run.set_tags({"system": "lc_dnn"})
        run.log_metrics({"loss": 0.7, "auc": 0.6}, step=1)
        run.log_metrics({"loss": 0.5}, step=2)
    assert run_of(config, parent).info.status == "RUNNING"
    tracking.end_run(config, parent, "FINISHED")

    data, info = run_of(config, parent).data, run_of(config, parent).info
    assert (info.status, info.run_name) == ("FINISHED", "toy")
    assert {"fingerprint": "abc", "raw_version": "3", "seed": "0"}.items() <= data.tags.items()
    assert data.params["training.batch_size"] == "512"
    assert data.params["systems"] == "lr, lc_dnn"
    assert f"name: {config.name}\n" in files_of(config, parent)["config.yaml"].read_text()

    child = run_of(config, run.run_id)
    assert (child.info.status, child.info.run_name) == ("FINISHED", "train_lc")
    assert child.data.tags["mlflow.parentRunId"] == parent
    assert child.data.tags["system"] == "lc_dnn"
    assert child.data.params == {"epochs": "3", "hidden": "(256, 128)"}
    client = mlflow.MlflowClient(tracking.uri_of(config))
    history = client.get_metric_history(run.run_id, "loss")
    assert [(entry.step, entry.value) for entry in history] == [(1, 0.7), (2, 0.5)]


def test_a_run_takes_figures_tables_and_text(config: Config) -> None:
    parent = tracking.start_pipeline(config, {})
    table = pd.DataFrame({"field": ["hour"], "weight": [0.5]})
    with tracking.stage(config, parent, "evaluate") as run:
        run.log_figure(figures.lr_loss([0.69, 0.5]), "loss.svg")
        run.log_figure(figures.lr_loss([0.69, 0.5]), "loss.png")
        run.log_table(table, "weights.json")
        run.log_text("hello", "notes.txt")
    files = files_of(config, run.run_id)
    assert "<svg" in files["loss.svg"].read_text()
    assert files["loss.png"].read_bytes().startswith(b"\x89PNG")
    stored = json.loads(files["weights.json"].read_text())
    assert stored == {"columns": ["field", "weight"], "data": [["hour", 0.5]]}
    assert files["notes.txt"].read_text() == "hello"


def test_artifacts_of_the_own_store_lie_in_the_workspace(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    run_id = tracking.start_pipeline(config, {})
    (path,) = tmp_path.glob("mlartifacts/**/config.yaml")
    assert run_id in path.parts


def test_more_parameters_than_one_call_takes(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    parent = tracking.start_pipeline(config, {})
    with tracking.stage(config, parent, "features") as run:
        run.log_params({f"p{i}": i for i in range(250)})
    assert len(run_of(config, run.run_id).data.params) == 250


def test_a_stage_that_raises_is_failed_and_the_error_goes_on(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    parent = tracking.start_pipeline(config, {})
    with (
        pytest.raises(ZeroDivisionError),
        tracking.stage(config, parent, "ingest") as run,
    ):
        raise ZeroDivisionError
    assert run_of(config, run.run_id).info.status == "FAILED"
    tracking.end_run(config, parent, "FAILED")
    assert run_of(config, parent).info.status == "FAILED"


def test_the_commit_is_the_one_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, key = make_config(tmp_path / "workspace"), "mlflow.source.git.commit"
    repository = tmp_path / "repository"
    repository.mkdir()
    monkeypatch.chdir(repository)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert key not in run_of(config, tracking.start_pipeline(config, {})).data.tags
    (repository / "file").write_text("text")
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "-q", "-m", "m"]
    for arguments in (["init", "-q"], ["add", "file"], who):
        subprocess.run(["git", *arguments], check=True)
    said = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    head = said.stdout.strip()
    assert run_of(config, tracking.start_pipeline(config, {})).data.tags[key] == head
    (repository / "file").write_text("changed")
    assert run_of(config, tracking.start_pipeline(config, {})).data.tags[key] == f"{head}-dirty"


@pytest.mark.slow
def test_another_process_can_append(config: Config) -> None:
    parent = tracking.start_pipeline(config, {})
    code = "import sys; from lc_spark import tracking\n"
    code += "tracking.append_to(*sys.argv[1:]).log_metrics({'loss': 0.25}, step=7)"
    with tracking.stage(config, parent, "train_lc") as run:
        command = [sys.executable, "-c", code, tracking.uri_of(config), run.run_id]
        subprocess.run(command, check=True)
        assert run_of(config, run.run_id).info.status == "RUNNING"
    assert run_of(config, run.run_id).data.metrics == {"loss": 0.25}


@pytest.mark.slow
def test_a_new_store_is_made_without_chatter(tmp_path: Path) -> None:
    code = "import logging; logging.basicConfig(level=logging.INFO)\n"
    code += "from lc_spark import tracking; from lc_spark.config import Config\n"
    code += "import sys; config = Config.model_validate_json(sys.argv[1])\n"
    code += "with tracking.stage(config, tracking.start_pipeline(config, {}), 'a'): pass"
    command = [sys.executable, "-c", code, make_config(tmp_path).model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_server_that_does_not_answer_is_said_at_once(tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    before = time.monotonic()
    with pytest.raises(LcSparkError, match=f"No MLflow server answers at {uri}"):
        tracking.start_pipeline(make_config(tmp_path, tracking={"uri": uri}), {})
    assert time.monotonic() - before < 15


def test_a_store_that_is_no_database_is_said(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database, and long enough to be read as one")
    with pytest.raises(LcSparkError, match="cannot be used"):
        tracking.start_pipeline(make_config(tmp_path), {})


def register(config: Config, folder: Path, logloss: float) -> str:
    parent = tracking.start_pipeline(config, {})
    with tracking.stage(config, parent, "evaluate") as run:
        return registry.register(config, run, folder, "lr", {"logloss": logloss, "auc": 0.75})


def aliases_of(config: Config) -> dict[str, str]:
    uri = tracking.uri_of(config)
    found = mlflow.MlflowClient(uri, uri).get_registered_model(config.model_name)
    return {alias: str(version) for alias, version in found.aliases.items()}


def test_a_version_knows_where_it_comes_from_and_is_registered_once(
    config: Config, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "lr")
    assert register(config, bundle, 0.5) == register(config, bundle, 0.5)
    assert aliases_of(config) == {"challenger": "1"}, "nobody is champion unasked"
    [found] = registry.versions(config)
    assert found.tags["logloss"] == "0.5"
    assert found.tags["auc"] == "0.75"
    assert found.tags["day"] == "all"
    assert found.tags["fingerprint"] == FieldMap.read(bundle / "field_map.json").fingerprint
    assert run_of(config, found.tags["run_id"]).info.run_name == "evaluate"
    (bundle / "model.json").write_text((bundle / "model.json").read_text() + " ")
    assert register(config, bundle, 0.6) == "2", "another model is another version"
    assert aliases_of(config) == {"challenger": "2"}


def test_promote_and_rollback_say_who_when_over_which_and_why(
    config: Config, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "lr")
    with pytest.raises(LcSparkError, match="no version is the champion"):
        registry.rollback(config, "nothing there")
    for number in (1, 2):
        (bundle / "mark").write_text(str(number))
        registry.promote(config, register(config, bundle, 0.5), f"test {number}")
    assert aliases_of(config) == {"challenger": "2", "champion": "2"}
    newest, older = registry.versions(config)
    assert (newest.version, newest.aliases) == ("2", ("challenger", "champion"))
    assert newest.tags["promoted_over"] == "1"
    assert older.tags["promoted_over"] == ""
    assert newest.tags["promoted_why"] == "test 2"
    assert newest.tags["promoted_by"]
    assert newest.was_promoted
    assert registry.rollback(config, "it was worse") == ("2", "1")
    assert aliases_of(config) == {"challenger": "2", "champion": "1"}
    newest, older = registry.versions(config)
    assert newest.tags["rolled_back_why"] == "it was worse"
    assert not newest.was_promoted
    assert older.was_promoted
    with pytest.raises(LcSparkError, match="there was none before it"):
        registry.rollback(config, "once more")
    registry.promote(config, "2", "it was right after all")
    assert registry.versions(config)[0].was_promoted
    with pytest.raises(LcSparkError, match="has no version 9"):
        registry.promote(config, "9", "a slip")


def test_the_registered_model_scores_raw_rows_as_the_scorer_does(
    config: Config, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "lr")
    registry.promote(config, register(config, bundle, 0.5), "test")
    mlflow.set_tracking_uri(tracking.uri_of(config))
    model = mlflow.pyfunc.load_model(f"models:/{config.model_name}@champion")
    scorer = Scorer(bundle)
    frames = {
        "whole": RAW,
        "other index": RAW.set_index(pd.Index([9, 3, 5, 5, 1])),
        "integers made float by a missing one": RAW.assign(shop=[7, 8, np.nan, 9, 8]),
        "pandas integers": RAW.assign(shop=pd.Series([7, 8, np.nan, 9, 8]).astype("Int64")),
        "columns missing": RAW[["shop"]],
        "a column all None": RAW.assign(color=None),
        "a column all NaN": RAW.assign(color=np.nan),
        "more columns": RAW.assign(label=1),
        "integers as prices": RAW.assign(price=[1, 2, 3, 4, 5]),
        "no row": RAW.head(0),
    }
    for what, raw in frames.items():
        scores = np.asarray(model.predict(raw))
        assert scores.dtype == np.float64, what
        assert scores.tolist() == scorer.score_pandas(raw).tolist(), what
    whole = scorer.score_pandas(RAW)
    assert len(set(whole.tolist())) == len(RAW)  # the rows differ, so the comparison tells
    with pytest.raises(MlflowException, match="none of the model's columns: color, shop"):
        model.predict(pd.DataFrame({"colour": ["red"]}))


def test_the_model_shows_its_columns_and_types(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    register(config, make_bundle(tmp_path / "lr"), 0.5)
    mlflow.set_tracking_uri(tracking.uri_of(config))
    info = mlflow.models.get_model_info("models:/toy/1")
    assert info.signature.inputs.input_names() == ["color", "shop", "price", "tags"]
    assert info.signature.inputs.required_input_names() == []
    types = {"color": "string", "shop": "bigint", "price": "double", "tags": "array<string>"}
    assert info.metadata is not None
    assert info.metadata["raw_columns"] == types
    client = mlflow.MlflowClient(tracking.uri_of(config), tracking.uri_of(config))
    description = client.get_model_version("toy", "1").description
    assert description == (
        "lr on raw rows with these columns: "
        "`color` string, `shop` bigint, `price` double, `tags` array<string>"
    )


def test_download_returns_the_bundle_and_fetches_it_once(config: Config, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "lr")
    registry.promote(config, register(config, bundle, 0.5), "test")
    folder = registry.download(config, f"models:/{config.model_name}@champion")
    assert folder.is_relative_to(str(config.workspace_path))
    for path in bundle.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    (folder / "mark").touch()
    assert registry.download(config, f"models:/{config.model_name}/1") == folder
    assert (folder / "mark").exists()
    for wrong in ("@nobody", "/99", "", "x@champion"):
        with pytest.raises(LcSparkError, match="There is no registered model"):
            registry.download(config, f"models:/{config.model_name}{wrong}")


def model_folder(tmp_path: Path) -> Path:
    config = make_config(tmp_path / "workspace")
    register(config, make_bundle(tmp_path / "lr"), 0.5)
    (path,) = Path(config.workspace).glob("mlartifacts/**/MLmodel")
    return path.parent


def test_the_model_folder_holds_code_and_data_but_nothing_pickled(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".pyc"))]
    assert {"code/lc_spark/encoder.py", "code/lc_spark/training/scorer.py"} <= names
    assert {"artifacts/lr/model.safetensors", "artifacts/lr/field_map.json"} <= names
    requirements = (folder / "requirements.txt").read_text().split()
    assert f"torch=={torch.__version__.split('+')[0]}" in requirements
    assert not [line for line in requirements if line.startswith(("pyspark", "petastorm"))]


@pytest.mark.slow
def test_a_fresh_process_scores_with_the_models_own_code_and_without_spark(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    code = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pyspark", "petastorm", "delta", "matplotlib", "jinja2"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
import lc_spark
scores = model.predict(pd.DataFrame({"color": ["red", None], "shop": [7, None]}))
print(json.dumps([lc_spark.__file__, list(scores)]))
"""
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    where, scores = json.loads(done.stdout.splitlines()[-1])
    assert Path(where).is_relative_to(folder)
    raw = pd.DataFrame({"color": ["red", None], "shop": [7, None]})
    assert scores == Scorer(tmp_path / "lr").score_pandas(raw).tolist()


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LcSparkError, match=f"^Port {port} is in use.*--port"):
            tracking.serve_ui(make_config(tmp_path), port)


def test_the_pages_of_a_server_are_its_own(tmp_path: Path) -> None:
    config = make_config(tmp_path, tracking={"uri": "http://tracking:5000"})
    with pytest.raises(LcSparkError, match="open it in the browser"):
        tracking.serve_ui(config, free_port())


@pytest.mark.slow
def test_serve_ui_shows_the_runs_of_the_workspace(tmp_path: Path) -> None:
    config, port = make_config(tmp_path / "workspace"), free_port()
    run_id = tracking.start_pipeline(config, {})
    code = "import sys; from lc_spark import tracking; from lc_spark.config import Config\n"
    code += "tracking.serve_ui(Config.model_validate_json(sys.argv[1]), int(sys.argv[2]))"
    process = start(["-c", code, config.model_dump_json(), str(port)], tmp_path / "log")
    uri = f"http://127.0.0.1:{port}"
    try:
        wait_for(uri, process, tmp_path / "log")
        asked = requests.get(f"{uri}/get-artifact?path=config.yaml&run_id={run_id}", timeout=30)
        assert "name: toy" in asked.text
        assert "<html" in requests.get(uri, timeout=30).text
    finally:
        stop(process)
