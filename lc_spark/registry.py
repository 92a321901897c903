"""Turns a trained model into a version in MLflow's registry, with aliases, and back into files.

With tracking.py the only file that imports mlflow. The registered model is one pyfunc on raw rows.
"""

import importlib.metadata
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import AnyType

from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.field_map import FieldMap
from lc_spark.tracking import StageRun, client_of, uri_of

log = logging.getLogger(__name__)

CHALLENGER, CHAMPION = "challenger", "champion"
DESCRIPTION_LENGTH = 5000  # characters: MLflow's limit
# What scoring imports; everything else in the environment only makes models.
SCORING_PACKAGES = (
    "mlflow", "numpy", "pandas", "pyarrow", "pydantic", "pyyaml", "safetensors", "torch", "xxhash",
)  # fmt: skip


def _log_model(run: StageRun, bundle: Path, field_map: FieldMap) -> Any:
    # MLflow checks declared types before the model sees a row, and would refuse an integer column
    # that pandas made float because a value is missing: the metadata and description tell types.
    columns = [ColSpec(AnyType(), name, required=False) for name in field_map.raw_columns]  # type: ignore[no-untyped-call]
    pinned = [f"{p}=={importlib.metadata.version(p).split('+')[0]}" for p in SCORING_PACKAGES]
    package = Path(__file__).parent
    client = client_of(run.uri)
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
    client, name = client_of(run.uri), config.model_name
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
    client = client_of(uri)
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
        found = client_of(uri_of(config)).get_model_version_by_alias(name, alias)
    except MlflowException as error:
        raise LcSparkError(
            f"There is no registered model '{model_uri}': train and evaluate one first."
        ) from error
    return f"models:/{name}/{found.version}"
