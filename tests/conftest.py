"""Fixtures that several tests share: one SparkSession, and a maker of configs."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from lc_spark import session
from lc_spark.config import Config
from lc_spark.features.fit import Fitted

# Beside another process of tests an example may take any time.
hypothesis.settings.register_profile("beside_others", deadline=None)
hypothesis.settings.load_profile("beside_others")

ConfigMaker = Callable[..., Config]

DEFAULTS: dict[str, Any] = {
    "name": "test",
    "seed": 7,
    "source": {"path": "there/is/no/source"},
    "label": "label",
    "split": {"by": "hash", "valid": 0.2, "test": 0.3},
    "fields": [{"name": "site", "kind": "categorical"}],
    "systems": ["lr", "lc_dnn"],
    "training": {"ranks": 2, "epochs": 1, "batch_size": 64, "hidden": [8, 4]},
    "spark": {
        "master": "local[2]",
        "driver_memory": "2g",
        "settings": {
            "spark.sql.shuffle.partitions": "2",
            # Tests run many plans once: the second compiler of the JVM never pays off.
            "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1",
            # Nor does Java source for each of them. The jobs of test_cluster have it.
            "spark.sql.codegen.wholeStage": "false",
            "spark.sql.codegen.factoryMode": "NO_CODEGEN",
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
        },
    },
}


def levels_of(fitted: Fitted, *fields: str) -> list[dict[str, Any]]:
    """All levels of a fit, or those of some fields, by field and index."""
    table = pa.Table.from_batches(fitted.levels.batches())
    texts = table["value"].cast(pa.large_binary()).to_pylist()  # one may be no UTF-8
    rows = [
        row | {"value": text.decode(errors="replace")}
        for row, text in zip(table.drop_columns(["value"]).to_pylist(), texts, strict=True)
        if not fields or row["field"] in fields
    ]
    return sorted(rows, key=lambda row: (row["field"], row["index"]))


def environment() -> dict[str, str]:
    """The variables that a person's command has: none of the test process' own Spark."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYSPARK_", "SPARK_"))}


@pytest.fixture(scope="session")
def make_config(tmp_path_factory: pytest.TempPathFactory) -> ConfigMaker:
    """A function: settings (top-level keys replace DEFAULTS) -> Config.

    Every call gets a new workspace, unless the settings name one.
    """

    def make(settings: dict[str, Any] | None = None) -> Config:
        workspace = str(tmp_path_factory.mktemp("workspace"))
        return Config.model_validate({**DEFAULTS, "workspace": workspace, **(settings or {})})

    return make


@pytest.fixture(scope="session")
def spark(
    make_config: ConfigMaker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SparkSession]:
    """The one session of the tests: local[2], two shuffle partitions, no UI."""
    settings = DEFAULTS["spark"]["settings"]
    warehouse = {"spark.sql.warehouse.dir": str(tmp_path_factory.mktemp("warehouse"))}
    config = make_config({"spark": {**DEFAULTS["spark"], "settings": {**settings, **warehouse}}})
    started = session.start(config)
    yield started
    started.stop()
