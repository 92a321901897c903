"""An experiment runs each cell once, goes on where it was, and compares on the same rows."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import DEFAULTS, ConfigMaker, environment
from pyspark.sql import SparkSession
from sklearn.metrics import log_loss, roc_auc_score

from lc_spark import bootstrap, config_file, datasets, experiment, tracking
from lc_spark.config import Config

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def test_cells_are_systems_by_starts_by_seeds_with_one_lr(make_config: ConfigMaker) -> None:
    config = make_config(
        {
            "systems": [
                "lc_dnn",
                "dnn",
                {"system": "lc_wd", "training": {"start": "random", "channels": 4}},
                "wide_deep",
            ],
            "experiment": {
                "seeds": [5, 6],
                "starts": ["lr", {"name": "soft", "training": {"start": "lr", "dropout": 0.5}}],
            },
        }
    )
    cells = experiment.cells(config)
    assert [cell.system.name for cell in cells] == [
        "lr",
        "lc_dnn_lr_seed5",
        "lc_dnn_lr_seed6",
        "lc_dnn_soft_seed5",
        "lc_dnn_soft_seed6",
        "dnn_seed5",
        "dnn_seed6",
        "lc_wd_seed5",
        "lc_wd_seed6",
        "wide_deep_seed5",
        "wide_deep_seed6",
    ]
    assert [cell.line for cell in cells[::2]] == [
        "lr", "lc_dnn, lr", "lc_dnn, soft", "dnn", "lc_wd", "wide_deep",
    ]  # fmt: skip
    full = experiment.expanded(config, cells)
    settings = {s.name: full.training_of(s) for s in full.systems}
    assert settings["lc_dnn_soft_seed5"].dropout == 0.5
    assert settings["lc_wd_seed6"].channels == 4
    assert (settings["dnn_seed5"].start, settings["dnn_seed5"].channels) == ("random", 1)
    wide_deep = settings["wide_deep_seed5"]
    assert (wide_deep.start, wide_deep.channels) == ("random", 16)


def drawn(n: int, strength: float, seed: int) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    logits = random.normal(0, 1, n)
    labels = (random.random(n) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    noise = random.normal(0, 1, n)
    scores = 1 / (1 + np.exp(-(strength * logits + (1 - strength) * noise)))
    return pd.DataFrame({"row_id": random.permutation(n), "label": labels, "score": scores})


def test_replicates_spread_as_redrawn_rows_do_and_are_paired(spark: SparkSession) -> None:
    good, same = drawn(2000, 0.9, 1), drawn(2000, 0.9, 1)
    bad = good.assign(score=drawn(2000, 0.3, 1)["score"])
    named = pd.concat(
        [
            good.assign(system="good"),
            same.sample(frac=1, random_state=3).assign(system="same"),
            bad.assign(system="bad"),
        ]
    )
    scores_df = spark.createDataFrame(named).repartition(5)
    found = bootstrap.replicates(scores_df, 2000, seed=7)
    assert found["good"].shape == (bootstrap.REPLICATES, 2)
    # The same scores give the same replicates, in whatever order the rows come.
    np.testing.assert_array_equal(found["good"], found["same"])
    labels, scores = good["label"].to_numpy(), good["score"].to_numpy()
    random = np.random.default_rng(0)
    redrawn = []
    for _ in range(300):
        rows = random.integers(0, 2000, 2000)
        aucs = roc_auc_score(labels[rows], scores[rows])
        redrawn.append((aucs, log_loss(labels[rows], scores[rows])))
    np.testing.assert_allclose(found["good"].mean(0), np.mean(redrawn, 0), atol=2e-3)
    np.testing.assert_allclose(found["good"].std(0), np.std(redrawn, 0), rtol=0.2)
    gain = roc_auc_score(labels, scores) - roc_auc_score(bad["label"], bad["score"])
    interval = bootstrap.difference([found["good"]], [found["bad"]], 0, gain)
    assert 0 < interval.low < interval.value < interval.high
    # Paired: the difference spreads less than the two AUCs on their own would let it.
    apart = np.hypot(found["good"][:, 0].std(), found["bad"][:, 0].std())
    assert interval.high - interval.low < 2 * 1.96 * apart
    nothing = bootstrap.difference([found["good"]], [found["same"]], 0, 0.0)
    assert nothing == (0.0, 0.0, 0.0)


def test_replicates_take_ties_as_scikit_learn_does() -> None:
    labels = np.array([1, 0, 1, 0, 0, 1], np.float32)
    scores = np.array([0.5, 0.5, 0.75, 0.25, 0.75, 0.5])
    found = bootstrap._replicates(labels, scores, seed=3)
    for replicate in range(20):
        weights = np.random.default_rng([3, replicate]).poisson(1.0, 6)
        if 0 < (weights * labels).sum() < weights.sum():
            expected = roc_auc_score(labels, scores, sample_weight=weights)
            assert found[replicate, 0] == pytest.approx(expected)


def test_a_lr_past_without_days_and_a_seed_named_twice_are_refused(
    make_config: ConfigMaker,
) -> None:
    starts = {"seeds": [1], "starts": ["random", "random"]}
    for settings, said in (
        ({"experiment": starts}, "two runs are named 'lc_dnn_random_seed1'"),
        ({"experiment": {"systems": ["lc_dnn", "lc_dnn"]}}, "two runs are named 'lc_dnn_seed1'"),
        ({"systems": [{"system": "lc_dnn", "name": "lr_fold_0"}]}, "kept for the LRs of starts"),
        ({"experiment": {"seeds": []}}, "at least 1 item"),
        ({"experiment": {"seeds": [1, 1]}}, "names a seed twice"),
        ({"experiment": {"starts": ["lr_past"]}}, "start lr_past needs source.date"),
        ({"systems": ["lc_dmn"]}, "lc_dnn"),
        ({"training": {"channels": 0}}, "greater than 0"),
    ):
        with pytest.raises(ValueError, match=said):
            make_config(settings)


# The whole of it, on a sample of the flights.


@pytest.fixture(scope="module")
def yaml_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    datasets.flights().sample(8_000, random_state=7).to_parquet(folder / "flights.parquet")
    settings = yaml.safe_load((ROOT / "conf" / "flights.yaml").read_text())
    settings["workspace"] = str(folder / "workspace")
    settings["source"] |= {"dataset": None, "path": str(folder / "flights.parquet")}
    settings["training"] |= {"epochs": 2, "batch_size": 64, "hidden": [16, 8]}
    settings["lr"] |= {"l2": [1e-3, 1e-4], "max_iterations": 20}
    settings["shards"] = {"folds": 3}
    settings["spark"] = DEFAULTS["spark"]
    settings["experiment"] = {
        "seeds": [1, 2],
        "starts": ["random", "lr", "lr_cross_fitted"],
        "systems": [
            "lr",
            "lc_dnn",
            "dnn",
            # Diverges for certain: the one that fails.
            {"system": "lc_wd", "name": "broken", "training": BROKEN},
        ],
    }
    path = folder / "flights.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


BROKEN = {"m1_learning_rate": 1e38, "batch_norm": False, "start": "random"}
TRAINED = [f"lc_dnn_{s}_seed{n}" for s in ("random", "lr", "lr_cross_fitted") for n in (1, 2)]
TRAINED += ["dnn_seed1", "dnn_seed2"]


def start_experiment(yaml_path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(BIN / "lc-spark"), "experiment", str(yaml_path)],
        cwd=ROOT,
        env=environment() | {"COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def finished(yaml_path: Path) -> str:
    """Kill the experiment once two cells are trained, start it again; return its second output."""
    config = config_file.load(yaml_path)
    first = start_experiment(yaml_path)
    results = [config.workspace_path / "models" / name / "result.json" for name in TRAINED[:2]]
    deadline = time.monotonic() + 1200
    while not all(path.is_file() for path in results):
        assert first.poll() is None, first.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    second = start_experiment(yaml_path)
    output = second.communicate(timeout=1500)[0]
    assert second.returncode == 0, output[-3000:]
    return output


@pytest.fixture(scope="module")
def config(yaml_path: Path, finished: str) -> Config:
    assert finished
    return config_file.load(yaml_path)


@pytest.fixture(scope="module")
def numbers(config: Config) -> dict[str, Any]:
    text = (config.workspace_path / "report" / "results.json").read_text()
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.mark.slow
def test_a_killed_experiment_goes_on_and_says_so(finished: str) -> None:
    for stage in ("ingest", "features", "train_lr"):
        assert f"{stage}: done before with the same settings" in finished
    assert any(f"experiment: {n} of 10 cells were trained before" in finished for n in (2, 3, 4))
    assert "Results on the test split" in finished
    assert "lc-spark ui" in finished.splitlines()[-1]


@pytest.mark.slow
def test_a_cell_that_fails_is_reported_and_loses_no_other(numbers: dict[str, Any]) -> None:
    assert [row["cell"] for row in numbers["failed"]] == ["broken_seed1", "broken_seed2"]
    assert all("loss is" in row["error"] for row in numbers["failed"])
    done = [cell["cell"] for cell in numbers["cells"] if cell["error"] is None]
    assert done == ["lr", *TRAINED]
    assert all(0.6 < cell["auc"] < 0.8 for cell in numbers["cells"] if cell["error"] is None)


@pytest.mark.slow
def test_the_tables_of_the_paper_are_there(config: Config, numbers: dict[str, Any]) -> None:
    manifest = json.loads((config.workspace_path / "shards" / "manifest.json").read_text())
    ours = numbers["table_1"][0]
    assert ours["train_rows"] == manifest["splits"]["train"]["rows"]
    assert ours["features"] - ours["categorical"] == 2  # latitude and longitude
    counted = {row["system"]: row["counted"] for row in numbers["table_3"]}
    assert list(counted) == ["lr", "lc_dnn", "dnn"]
    assert counted["dnn"] > 5 * counted["lc_dnn"] > 5 * counted["lr"] > 0
    table_4 = {row["system"]: row for row in numbers["table_4"]}
    assert list(table_4) == ["lr", *(f"lc_dnn, {s}" for s in STARTS), "dnn"]
    for name, row in table_4.items():
        seeds = [c["auc"] for c in numbers["cells"] if _line(c) == name and c["auc"]]
        assert row["seeds"] == len(seeds)
        assert row["auc"] == pytest.approx(np.mean(seeds))
    assert table_4["lr"]["auc_gain"].startswith("+0.0000 [+0.0000")
    assert table_4["dnn"]["paper_app"] == 0.8633
    assert list(numbers["curves"]) == STARTS
    assert numbers["curves"]["lr"]["epoch"] == [0.5, 1, 1.5, 2]
    assert len(numbers["curves"]["lr"]["test_auc"]) == 4
    leak = [row["auc"] for row in numbers["lr_leak"]]
    assert leak[0] > leak[-1]  # LR is better on the rows it was fitted on
    assert len(numbers["claims"]) == 3
    assert "the lowest validation log loss" in numbers["claims"][0]
    assert all("against 'random'" in claim for claim in numbers["claims"][1:])


STARTS = ["random", "lr", "lr_cross_fitted"]


def _line(cell: dict[str, Any]) -> str:
    return f"{cell['system']}, {cell['start']}" if cell["start"] else str(cell["system"])


@pytest.mark.slow
def test_the_page_has_every_section(config: Config) -> None:
    page = (config.workspace_path / "report" / "index.html").read_text()
    for title in (
        "Do LR weights help?",
        "The data (the paper&#39;s Table 1)",
        "Parameters (the paper&#39;s Tables 2 and 3)",
        "Quality on the test rows (the paper&#39;s Table 4)",
        "What LR knows of the rows it was fitted on",
        "Cells that could not be trained",
        "The starts of M1 by epoch",
        "Seconds per epoch",
    ):
        assert title in page, title


@pytest.mark.slow
def test_mlflow_has_one_parent_with_a_child_a_cell(config: Config) -> None:
    client = mlflow.MlflowClient(tracking.uri_of(config))
    found = client.get_experiment_by_name(config.tracking.experiment)
    assert found is not None
    runs = client.search_runs([found.experiment_id], max_results=200)
    [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.data.tags["kind"] == "experiment"
    assert parent.info.status == "FINISHED"
    cells = {run.info.run_name: run for run in runs if "start" in run.data.tags}
    assert set(cells) == {*TRAINED, "broken_seed1", "broken_seed2"}
    assert {run.info.status for name, run in cells.items() if "broken" in name} == {"FAILED"}
    one = cells["lc_dnn_lr_seed1"]
    assert one.info.status == "FINISHED"
    assert one.data.params["start"] == "lr"
    assert one.data.metrics["final_auc"] > 0.6
    assert len(client.get_metric_history(one.info.run_id, "valid_auc")) >= 2
