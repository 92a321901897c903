"""The registered model behind MLflow's scoring server and as a Spark function: the same scores."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import requests
from mlflow.exceptions import MlflowException
from pyspark.sql import SparkSession
from test_tracking import RAW, free_port, make_bundle, make_config, register, start, stop, wait_for

from lc_spark import registry, serving, tracking
from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.training.scorer import Scorer


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Settings of a workspace with a champion."""
    folder = tmp_path_factory.mktemp("serving")
    config = make_config(folder / "workspace")
    version = register(config, make_bundle(folder / "lr"), 0.5)
    registry.promote(config, version, "test")
    return config


@pytest.fixture(scope="module")
def scores(config: Config) -> list[float]:
    scored: list[float] = Scorer(Path(config.workspace).parent / "lr").score_pandas(RAW).tolist()
    return scored


@pytest.fixture(scope="module")
def server(config: Config) -> Iterator[str]:
    """The address of `lc-spark serve`."""
    port, folder = free_port(), Path(config.workspace).parent
    (folder / "toy.yaml").write_text(config.model_dump_json(exclude_defaults=True))
    code = "from lc_spark.cli import main; main()"
    process = start(["-c", code, "serve", "toy.yaml", "--port", str(port)], folder / "log")
    try:
        wait_for(f"http://127.0.0.1:{port}", process, folder / "log")
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        stop(process)


def ask(server: str, body: str, kind: str = "application/json") -> requests.Response:
    return requests.post(server, data=body, headers={"Content-Type": kind}, timeout=60)


def rows(**columns: Any) -> str:
    return json.dumps({"dataframe_records": [columns]})


@pytest.mark.slow
def test_the_server_answers_rows_with_the_scores_of_the_batch(
    server: str, scores: list[float]
) -> None:
    split = json.loads(RAW.to_json(orient="split", index=False))
    records = json.loads(RAW.to_json(orient="records"))
    for body in ({"dataframe_split": split}, {"dataframe_records": records}):
        answer = ask(server, json.dumps(body))
        assert answer.status_code == 200, answer.text
        assert answer.json() == {"predictions": scores}


MALFORMED = {
    '{"dataframe_records": [': "valid JSON",
    "": "valid JSON",
    "[]": "must be a JSON dictionary",
    "{}": "exactly one of the input fields",
    '{"dataframe_records": []}': "none of the model's columns: color, shop, price, tags",
    '{"dataframe_split": {"columns": ["color"], "data": [[1, 2]]}}': "passed data had 2 columns",
    '{"dataframe_records": 5}': "must be a list of records",
    rows(price="cheap"): "Column 'price' must hold numbers",
    rows(price=[1]): "Column 'price' must hold numbers",
    rows(shop="seven"): "Column 'shop' must hold values of type bigint",
    rows(color={"a": 1}): "Column 'color' must hold values of type string",
    rows(tags=3): "Column 'tags' must hold values of type array<string>: 3 is no list",
    rows(colour="red"): "none of the model's columns",
    rows(shop=10**400): "int too large",
}


@pytest.mark.slow
def test_a_malformed_request_is_a_sentence_and_the_server_lives_on(
    server: str, scores: list[float]
) -> None:
    for body, said in MALFORMED.items():
        answer = ask(server, body)
        assert answer.status_code == 400, (body, answer.text)
        assert said in answer.json()["message"], body
    assert ask(server, "<rows/>", "text/xml").status_code == 415
    one = ask(server, rows(color="red", shop=7, price=1.5, tags=["x"]))
    assert one.json() == {"predictions": scores[:1]}


@pytest.mark.slow
def test_a_spark_function_gives_the_same_scores(
    spark: SparkSession, config: Config, scores: list[float]
) -> None:
    mlflow.set_tracking_uri(tracking.uri_of(config))
    schema = "n int, color string, shop bigint, price double, tags array<string>"
    numbered = [(i, *row) for i, row in enumerate(RAW.replace({np.nan: None}).to_numpy().tolist())]
    rows_df = spark.createDataFrame(numbered, schema).repartition(2)
    score = mlflow.pyfunc.spark_udf(spark, "models:/toy@champion", env_manager="local")
    found = rows_df.select("n", score(*RAW.columns).alias("score")).orderBy("n").collect()
    assert [row["score"] for row in found] == scores


def test_a_loaded_model_raises_what_the_server_answers_as_400(config: Config) -> None:
    mlflow.set_tracking_uri(tracking.uri_of(config))
    model = mlflow.pyfunc.load_model("models:/toy@champion")
    for wrong in ({"price": ["cheap"]}, {"colour": ["red"]}):
        with pytest.raises(MlflowException) as caught:
            model.predict(pd.DataFrame(wrong))
        assert caught.value.error_code == "INVALID_PARAMETER_VALUE"
    assert len(model.predict(RAW[:0])) == 0


def test_serving_without_a_champion_is_said(config: Config) -> None:
    nobody = config.tracking.model_copy(update={"model_name": "nobody"})
    with pytest.raises(LcSparkError, match="no registered model 'models:/nobody@champion'"):
        serving.serve(config.model_copy(update={"tracking": nobody}), free_port())
