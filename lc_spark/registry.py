"""Turns a trained model into a version in MLflow's registry, with aliases, and back into files.

With tracking.py the only file that imports mlflow. The registered model is one pyfunc on raw rows.
"""

import datetime
import getpass
import hashlib
import importlib.metadata
import logging
import os
import tempfile
import warnings
from dataclasses import dataclass
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
from lc_spark.files import package_folder
from lc_spark.tracking import StageRun, client_of, uri_of

log = logging.getLogger(__name__)

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "lc_spark").expanduser()
CHALLENGER, CHAMPION = "challenger", "champion"
DESCRIPTION_LENGTH = 5000  # characters: MLflow's limit
# What scoring imports; everything else in the environment only makes models.
SCORING_PACKAGES = (
    "mlflow", "numpy", "pandas", "pyarrow", "pydantic", "pyyaml", "safetensors", "torch",
    "universal-pathlib", "xxhash",
)  # fmt: skip


def _log_model(run: StageRun, bundle: Path, system: str, field_map: FieldMap) -> Any:
    # MLflow checks declared types before the model sees a row, and would refuse an integer column
    # that pandas made float because a value is missing: the metadata and description tell types.
    columns = [ColSpec(AnyType(), name, required=False) for name in field_map.raw_columns]  # type: ignore[no-untyped-call]
    pinned = [f"{p}=={importlib.metadata.version(p).split('+')[0]}" for p in SCORING_PACKAGES]
    client = client_of(run.uri)
    experiment_id = client.get_run(run.run_id).info.experiment_id
    logged = client.create_logged_model(experiment_id, system, run.run_id)
    with warnings.catch_warnings(), package_folder() as package:
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


def register(
    config: Config, run: StageRun, bundle: Path, system: str, metrics: dict[str, float]
) -> str:
    """Log a system's bundle as a model on raw rows, register it, and return its version.

    The version becomes `challenger`. The same model of the same day is registered once: a day that
    is run twice adds nothing.
    """
    client, name = client_of(run.uri), config.model_name
    field_map = FieldMap.read(bundle / "field_map.json")
    tags = {"fingerprint": field_map.fingerprint, "run_id": run.run_id, "system": system}
    tags |= {"day": str(config.day or "all"), "bundle_digest": _digest(bundle)}
    tags |= {key: repr(float(value)) for key, value in metrics.items()}
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    for known in versions(config):
        if all(known.tags.get(key) == tags[key] for key in ("day", "bundle_digest")):
            log.info("%s version %s is this very model", name, known.version)
            client.set_registered_model_alias(name, CHALLENGER, known.version)
            return known.version
    mlflow.set_tracking_uri(run.uri)  # what follows also makes clients of its own
    model = _log_model(run, bundle, system, field_map)
    columns = ", ".join(f"`{column}` {kind}" for column, kind in field_map.raw_columns.items())
    about = f"{system} on raw rows with these columns: {columns}"[:DESCRIPTION_LENGTH]
    made = client.create_model_version(
        name, model.model_uri, run.run_id, tags, description=about, model_id=model.model_id
    )
    client.set_registered_model_alias(name, CHALLENGER, made.version)
    return str(made.version)


def _digest(bundle: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(bundle.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Version:
    """A version of the registered model; see `register` and `promote` for its tags."""

    version: str
    aliases: tuple[str, ...]
    tags: dict[str, str]

    @property
    def was_promoted(self) -> bool:
        """Whether it has been the champion, and was not rolled back."""
        return "promoted_at" in self.tags and "rolled_back_at" not in self.tags


def versions(config: Config) -> list[Version]:
    """Return all versions of the config's model, the newest first; none if it is not registered."""
    client, name = client_of(uri_of(config)), config.model_name
    if not client.search_registered_models(f"name = '{name}'"):
        return []
    aliases = client.get_registered_model(name).aliases  # the search below leaves them out
    found = client.search_model_versions(f"name = '{name}'", max_results=10_000)
    return sorted(
        (
            Version(
                str(each.version),
                tuple(sorted(a for a, v in aliases.items() if str(v) == str(each.version))),
                dict(each.tags),
            )
            for each in found
        ),
        key=lambda each: -int(each.version),
    )


def with_alias(config: Config, alias: str) -> Version | None:
    """Return the version that has an alias, if one has."""
    return next((each for each in versions(config) if alias in each.aliases), None)


def note(config: Config, version: str, tags: dict[str, str]) -> None:
    """Set tags of a version."""
    for key, value in tags.items():
        client_of(uri_of(config)).set_model_version_tag(config.model_name, version, key, value)


def promote(config: Config, version: str, why: str) -> None:
    """Make a version the champion; who did it, when, over which one and why is in its tags."""
    if version not in {each.version for each in versions(config)}:
        raise LcSparkError(
            f"{config.model_name} has no version {version}: see 'lc-spark champion'."
        )
    before = with_alias(config, CHAMPION)
    if before is not None and before.version == version:
        log.info("%s version %s is the champion already", config.model_name, version)
        return
    client, over = client_of(uri_of(config)), before.version if before else ""
    by = {"promoted_at": _now(), "promoted_by": getpass.getuser(), "promoted_over": over}
    # The alias comes last: killed before it, the same call again does the rest.
    note(config, version, {**by, "promoted_why": why})
    client.delete_model_version_tag(config.model_name, version, "rolled_back_at")
    client.set_registered_model_alias(config.model_name, CHAMPION, version)


def rollback(config: Config, why: str) -> tuple[str, str]:
    """Give `champion` back to the version before; return the old champion and the new one.

    Raises LcSparkError when there is no champion, or none before it.
    """
    champion = with_alias(config, CHAMPION)
    over = champion.tags.get("promoted_over") if champion else None
    if champion is None or not over:
        held = f"version {champion.version}" if champion else "no version"
        raise LcSparkError(
            f"{config.model_name}: {held} is the champion and there was none before it, so there "
            "is nothing to go back to. See 'lc-spark champion'; 'lc-spark promote' takes any."
        )
    client_of(uri_of(config)).set_registered_model_alias(config.model_name, CHAMPION, over)
    by = {"rolled_back_at": _now(), "rolled_back_by": getpass.getuser()}
    note(config, champion.version, {**by, "rolled_back_why": why})
    return champion.version, over


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def download(config: Config, model_uri: str) -> Path:
    """Return a local bundle folder of models:/NAME@ALIAS or models:/NAME/VERSION.

    Kept by model id in the workspace, or this machine's cache, so that a version is fetched once.
    Raises LcSparkError when there is no such model.
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
    workspace = config.workspace_path
    here = workspace if isinstance(workspace, Path) else CACHE / config.name
    folder = here / "models" / "registered" / str(found.source).rsplit("/", 1)[-1]
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
