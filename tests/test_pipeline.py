"""The whole road on a sample of the flights, through the commands that people type."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import DEFAULTS, environment
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from lc_spark import config_file, datasets, registry, score, tables, tracking
from lc_spark.config import Config
from lc_spark.ingest import split_column
from lc_spark.training.scorer import Scorer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
ROWS = 24_000


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a person would, without the settings of the test process' own Spark."""
    # The environment is activated: spark-submit finds Spark through the python on the PATH.
    variables = environment() | {"COLUMNS": "100", "PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def yaml_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    sample = datasets.flights().sample(ROWS, random_state=7)
    sample.to_parquet(folder / "flights.parquet", index=False)
    settings = yaml.safe_load((ROOT / "conf" / "flights.yaml").read_text())
    settings["workspace"] = str(folder / "workspace")
    settings["source"] |= {"dataset": None, "path": str(folder / "flights.parquet")}
    settings["training"] |= {"epochs": 2, "batch_size": 64}
    settings["lr"] |= {"l2": 1e-3, "max_iterations": 30}  # so few rows need more of the first
    settings["spark"] = DEFAULTS["spark"]
    settings["systems"] = ["lr", "lc_dnn", "lc_wd"]
    path = folder / "flights.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(yaml_path: Path) -> subprocess.CompletedProcess[str]:
    done = run(BIN / "lc-spark", "run", yaml_path)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def config(yaml_path: Path, finished: subprocess.CompletedProcess[str]) -> Config:
    assert finished.returncode == 0
    return config_file.load(yaml_path)


def test_run_ends_with_the_table_and_where_to_look(
    finished: subprocess.CompletedProcess[str], config: Config
) -> None:
    last = finished.stdout.splitlines()[-20:]
    for system in ("lr", "lc_dnn", "lc_wd"):
        assert any(line.strip().startswith(system) for line in last)
    assert str(config.workspace_path / "report" / "index.html") in finished.stdout
    assert "lc-spark ui" in last[-1]


def test_results_have_every_system_and_number(config: Config) -> None:
    numbers = json.loads((config.workspace_path / "report" / "results.json").read_text())
    assert {"table_1", "table_3"} <= set(numbers)
    results = numbers["results"]
    assert [result["system"] for result in results] == ["lr", "lc_dnn", "lc_wd"]
    for result in results:
        assert 0.6 < result["auc"] < 0.9
        assert 0.3 < result["logloss"] < 0.6
        assert 0.5 < result["ne"] < 1
        assert 0.7 < result["calibration"] < 1.4
        assert result["seconds_per_epoch"] > 0
        assert result["parameters"] > 1000
        assert result["run_id"]
    assert results[2]["parameters"] > results[1]["parameters"] > results[0]["parameters"]


def test_row_counts_add_up(
    spark: SparkSession, config: Config, finished: subprocess.CompletedProcess[str]
) -> None:
    raw_df = tables.read(spark, config, "raw")
    rejected = tables.read(spark, config, "rejected").groupBy("reason").count().collect()
    by_reason = {row["reason"]: row["count"] for row in rejected}
    assert config.source.path is not None
    source = pd.read_parquet(config.source.path)
    assert by_reason == {
        "cancelled": int(source["dep_time"].isna().sum()),
        "diverted": int((source["arr_delay"].isna() & source["dep_time"].notna()).sum()),
    }
    n_raw = raw_df.count()
    assert n_raw + sum(by_reason.values()) == ROWS
    manifest = json.loads((config.workspace_path / "shards" / "manifest.json").read_text())
    counts = raw_df.groupBy(split_column(config).alias("split")).count().collect()
    assert {r["split"]: r["count"] for r in counts} == {
        split: part["rows"] for split, part in manifest["splits"].items()
    }
    assert f"{ROWS:,} source rows = {n_raw:,} raw + {sum(by_reason.values()):,} rejected" in (
        finished.stderr
    )
    test_scores = tables.read(spark, config, "test_scores").groupBy("system").count().collect()
    assert {r["count"] for r in test_scores} == {manifest["splits"]["test"]["rows"]}


def test_registered_model_scores_raw_rows_as_the_pipeline_did(
    spark: SparkSession, config: Config
) -> None:
    mlflow.set_tracking_uri(tracking.uri_of(config))
    model = mlflow.pyfunc.load_model(f"models:/{config.model_name}@champion")
    winner = (
        mlflow.MlflowClient(tracking.uri_of(config))
        .search_runs(
            [tracking_experiment(config)], "tags.stage = 'evaluate'", order_by=["start_time DESC"]
        )[0]
        .data.tags["winner"]
    )
    scores = (
        tables.read(spark, config, "test_scores")
        .where(F.col("system") == winner)
        .select("row_id", "score")
        .toPandas()
        .drop_duplicates("row_id")
    )
    raw = tables.read(spark, config, "raw").toPandas().drop_duplicates("row_id")
    both = raw.merge(scores, on="row_id", validate="one_to_one")
    assert len(both) == len(scores)
    predicted = np.asarray(model.predict(both.drop(columns=["score", "label", "row_id"])))
    np.testing.assert_allclose(predicted.ravel(), both["score"], atol=1e-6, rtol=0)


def tracking_experiment(config: Config) -> str:
    client = mlflow.MlflowClient(tracking.uri_of(config))
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    return str(experiment.experiment_id)


def test_unseen_values_and_missing_columns_score_alike_in_spark_and_without(
    spark: SparkSession, config: Config
) -> None:
    bundle = registry.download(config, f"models:/{config.model_name}@champion")
    raw_df = tables.read(spark, config, "raw").orderBy("row_id").limit(500)
    strange_df = raw_df.withColumns(
        {
            "tailnum": F.lit("never seen"),
            "dest": F.lit("Zürich"),
            "temp": F.lit(1e9),
            "seats": F.lit(None).cast("bigint"),
            "weekday": F.lit(""),
            "month": F.lit(None).cast("bigint"),
        }
    )
    with score.scored_rows(strange_df, bundle) as scored:
        in_spark = scored.scores_df.toPandas()
    raw = strange_df.toPandas().drop(columns=["seats", "month"])
    without = Scorer(bundle).score_pandas(raw)
    by_row = dict(zip(in_spark["row_id"], in_spark["score"], strict=True))
    np.testing.assert_allclose(without, [by_row[i] for i in raw["row_id"]], atol=1e-6, rtol=0)


def test_spark_submit_builds_the_same_features(config: Config, yaml_path: Path) -> None:
    shards = config.workspace_path / "shards"
    before = json.loads((shards / "manifest.json").read_text())
    done = run(
        BIN / "spark-submit",
        "--master",
        "local[2]",
        "--properties-file",
        "conf/spark.conf",
        "jobs/build_features.py",
        "--config",
        yaml_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((shards / "manifest.json").read_text()) == before


def test_score_job_overwrites_its_day_with_the_champion(
    spark: SparkSession, config: Config, yaml_path: Path
) -> None:
    for _ in range(2):
        done = run(sys.executable, "jobs/score.py", "--config", yaml_path, "--date", "2013-07-04")
        assert done.returncode == 0, done.stderr[-3000:]
    scores = tables.read(spark, config, "scores").toPandas()
    raw_df = tables.read(spark, config, "raw").where("date = DATE'2013-07-04'")
    assert len(scores) == raw_df.count() > 0
    assert set(scores["model"]) == {f"models:/{config.model_name}/1"}
    assert scores["score"].between(0, 1).all()


def test_mlflow_has_a_parent_and_a_finished_child_a_stage(config: Config) -> None:
    client = mlflow.MlflowClient(tracking.uri_of(config))
    runs = client.search_runs([tracking_experiment(config)], max_results=100)
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    # The later spark-submit and score jobs went on with the same parent.
    assert len(parents) == 1
    stages = {r.info.run_name: r for r in runs if "mlflow.parentRunId" in r.data.tags}
    assert {"ingest", "features", "lr", "lc_dnn", "lc_wd", "evaluate"} <= set(stages)
    assert all(r.info.status == "FINISHED" for r in stages.values())
    assert stages["lc_dnn"].data.metrics["test_auc"] > 0.6
    losses = client.get_metric_history(stages["lr"].info.run_id, "objective")
    assert losses[-1].value < losses[0].value


def test_a_stage_without_its_input_says_which_to_run(yaml_path: Path, tmp_path: Path) -> None:
    done = run(
        sys.executable,
        "jobs/train_lr.py",
        "--config",
        yaml_path,
        "--set",
        f"workspace={tmp_path}/empty",
    )
    assert done.returncode == 1
    assert "run the features stage first" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_typing_slip_is_one_sentence(yaml_path: Path) -> None:
    done = run(BIN / "lc-spark", "run", yaml_path, "--set", "training.epoch=3")
    assert done.returncode == 1
    assert "training.epoch" in done.stderr
    assert "Did you mean 'epochs'?" in done.stderr
    assert "Traceback" not in done.stderr
