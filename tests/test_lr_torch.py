"""LR by torch finds what MLlib and scikit-learn find, and gives what the path of MLlib gives."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
import torch
from conftest import ConfigMaker
from numpy.typing import NDArray
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from sklearn.metrics import log_loss, roc_auc_score
from test_lr import make_sets, matrix_of, scikit_learn_lr
from training_data import DAYS, FIELD_MAP, FIRST_DATE, FOLDS, run_ranks, write_shards

from lc_spark import config_file, datasets, facts, metrics, pipeline, score, tables
from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.features.shards import part_files, read_field_map
from lc_spark.systems import Lr
from lc_spark.training import lr_choice, models
from lc_spark.training.lr_loop import LrSpec, _Trainer, run_lr_rank
from lc_spark.training.lr_network import Part
from lc_spark.training.proximal import ProximalAdagrad
from lc_spark.training.world import joined

FLIGHTS = Path(__file__).parent.parent / "conf" / "flights.yaml"
PAST = FIRST_DATE + DAYS - 3
RANK = """
import json, sys
from lc_spark.training.lr_loop import run_lr_rank
print("RESULT " + json.dumps(run_lr_rank(json.loads(sys.argv[1]))), flush=True)
"""


def write_log(folder: Path) -> None:
    """Write shards with every kind of field."""
    write_shards(folder, FIELD_MAP, {"train": [450] * 4, "valid": [600]})
    for split in ("train", "valid"):
        for path in part_files(folder / "shards", split):
            make_sets(Path(str(path)))


def rows_of(folder: Path) -> pd.DataFrame:
    """Return fold and date of the train rows, in the order of matrix_of."""
    paths = part_files(folder / "shards", "train")
    parts = [pq.read_table(path, columns=["fold", "date"]).to_pandas() for path in paths]
    return pd.DataFrame(pd.concat(parts).reset_index(drop=True))


def seen_by(folder: Path) -> dict[str, NDArray[np.bool_]]:
    """Return which train rows each LR sees."""
    rows = rows_of(folder)
    seen = {"lr": np.ones(len(rows), bool)}
    seen |= {f"lr_fold_{fold}": (rows["fold"] != fold).to_numpy() for fold in range(FOLDS)}
    return seen | {"lr_past_3": (rows["date"] < PAST).to_numpy()}


def spec_of(folder: Path, **settings: Any) -> LrSpec:
    parts = [
        Part(
            name,
            int(seen.sum()),
            fold=int(name[-1]) if "fold" in name else None,
            before=PAST if "past" in name else None,
        )
        for name, seen in seen_by(folder).items()
    ]
    defaults: dict[str, Any] = {
        "l2": [1e-1, 1e-2],
        "epochs": 2,
        "batch_size": 50,
        "learning_rate": 1.0,
        "device": "cpu",
        "seed": 7,
    }
    as_fields = [dataclasses.asdict(part) for part in parts]
    return LrSpec(folder=str(folder), parts=as_fields, **{**defaults, **settings})


def fit(spec: LrSpec) -> dict[str, Any]:
    return run_lr_rank(dataclasses.asdict(spec))


def weights_of(folder: Path, name: str) -> NDArray[np.float64]:
    """Return the weights of a stored LR, its bias the last of them."""
    network, description = models.load(folder / "models" / name)
    assert isinstance(network, models.Lr)
    assert description["fingerprint"] == FIELD_MAP.fingerprint
    weights = network.weight.detach().double().numpy()
    return np.append(weights, network.bias.item())


def objective(weights: NDArray[np.float64], x: sp.csr_matrix, y: pd.Series, l2: float) -> float:
    signed = (x @ weights[:-1] + weights[-1]) * (2 * y.to_numpy() - 1)
    penalty = l2 / 2 * float((weights[:-1] ** 2).sum())
    return float(np.logaddexp(0, -signed).mean()) + penalty


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, make_config: ConfigMaker
) -> tuple[Path, Config, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("long")
    write_log(folder)
    config = make_config({"workspace": str(folder)})
    return folder, config, fit(spec_of(folder, epochs=25))


def test_every_lr_comes_near_the_optimum_of_its_own_rows(
    trained: tuple[Path, Config, dict[str, Any]],
) -> None:
    folder, config, result = trained
    x, y = matrix_of(config, FIELD_MAP, "train")
    for name, seen in seen_by(folder).items():
        theirs = scikit_learn_lr(x[seen], y[seen], result["l2"])
        best = np.append(theirs.coef_[0], theirs.intercept_)
        least = objective(best, x[seen], y[seen], result["l2"])
        found = objective(weights_of(folder, name), x[seen], y[seen], result["l2"])
        started = objective(np.zeros(FIELD_MAP.d + 1), x[seen], y[seen], result["l2"])
        assert started - least > 0.05, "there is something to find"
        assert least - 1e-6 < found < least + 5e-4, name


def test_valid_losses_and_aucs_are_those_of_scikit_learn(
    trained: tuple[Path, Config, dict[str, Any]],
) -> None:
    folder, config, result = trained
    x, y = matrix_of(config, FIELD_MAP, "train")
    x_valid, y_valid = matrix_of(config, FIELD_MAP, "valid")
    for l2, loss in result["valid_losses"]:
        theirs = scikit_learn_lr(x, y, l2)
        assert loss == pytest.approx(log_loss(y_valid, theirs.predict_proba(x_valid)), abs=1e-3)
    losses = dict(result["valid_losses"])
    assert result["l2"] == min(losses, key=lambda l2: losses[l2])
    # The numbers are of the weights that are stored, to the last digits.
    mine = weights_of(folder, "lr")
    logits = {"train": x @ mine[:-1], "valid": x_valid @ mine[:-1]}
    assert result["aucs"]["train"] == pytest.approx(roc_auc_score(y, logits["train"]), abs=1e-6)
    assert result["aucs"]["valid"] == pytest.approx(
        roc_auc_score(y_valid, logits["valid"]), abs=1e-6
    )
    seen, unseen = seen_by(folder), np.zeros(len(y))
    for fold in range(FOLDS):
        held_out, weights = ~seen[f"lr_fold_{fold}"], weights_of(folder, f"lr_fold_{fold}")
        unseen[held_out] = x[held_out] @ weights[:-1] + weights[-1]
    assert result["aucs"]["lr_cross_fitted"] == pytest.approx(roc_auc_score(y, unseen), abs=1e-6)
    late = ~seen["lr_past_3"]
    logits_late = x[late] @ weights_of(folder, "lr_past_3")[:-1]
    assert result["aucs"]["lr_past_3"] == pytest.approx(
        roc_auc_score(y[late], logits_late), abs=1e-6
    )


def test_the_history_begins_at_the_base_rate_and_ends_at_the_objective(
    trained: tuple[Path, Config, dict[str, Any]],
) -> None:
    folder, config, result = trained
    x, y = matrix_of(config, FIELD_MAP, "train")
    history = result["loss_history"]
    assert len(history) == result["iterations"] + 1 == 26
    assert history[0] == pytest.approx(log_loss(y, np.full(len(y), y.mean())), abs=1e-6)
    found = objective(weights_of(folder, "lr"), x, y, result["l2"])
    assert history[-1] == pytest.approx(found, abs=1e-6)


def change_labels(folder: Path, which: Any) -> None:
    """Turn the labels of the train rows that a function of (fold, date) picks."""
    for path in part_files(folder / "shards", "train"):
        table = pq.read_table(path)
        frame = table.to_pandas()
        picked = which(frame["fold"], frame["date"])
        assert picked.any()
        labels = np.where(picked, 1 - frame["label"], frame["label"]).astype(np.float32)
        at = table.column_names.index("label")
        pq.write_table(table.set_column(at, "label", pa.array(labels)), path)


@pytest.mark.parametrize(
    ("which", "unmoved"),
    [
        (lambda fold, date: fold == 1, "lr_fold_1"),
        (lambda fold, date: date >= PAST, "lr_past_3"),
    ],
)
def test_rows_that_are_held_out_do_not_move_a_bit_of_their_lr(
    tmp_path: Path, which: Any, unmoved: str
) -> None:
    folders = tmp_path / "as_they_are", tmp_path / "turned"
    for folder in folders:
        write_log(folder)
    change_labels(folders[1], which)
    for folder in folders:
        fit(spec_of(folder, l2=[1e-2], epochs=1))
    for name in seen_by(folders[0]):
        before, after = (weights_of(folder, name) for folder in folders)
        assert np.array_equal(before, after) == (name == unmoved), name


def test_two_ranks_find_what_one_finds(tmp_path: Path, make_config: ConfigMaker) -> None:
    found, auc = {}, {}
    for size in (1, 2):
        folder = tmp_path / str(size)
        write_log(folder)
        config = make_config({"workspace": str(folder)})
        spec = spec_of(folder, l2=[1e-2], epochs=10, batch_size=100 // size)
        result, output = run_ranks(spec, size, RANK)
        assert "lr: 5 LRs over 79 features at once" in output
        x, y = matrix_of(config, FIELD_MAP, "train")
        found[size] = {
            name: objective(weights_of(folder, name), x[seen], y[seen], 1e-2)
            for name, seen in seen_by(folder).items()
        }
        auc[size] = result["aucs"]
    assert found[2] == pytest.approx(found[1], abs=5e-4)
    assert auc[2] == pytest.approx(auc[1], abs=2e-3)


def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        write_log(folder)
    expected = fit(spec_of(whole))
    with joined("cpu") as world:
        _Trainer(spec_of(cut), world)._epoch(1)
    capsys.readouterr()
    found = fit(spec_of(cut))
    assert "going on from the checkpoint after epoch 1" in capsys.readouterr().out
    for key in ("valid_losses", "aucs", "loss_history"):
        assert found[key] == expected[key]
    for name in seen_by(cut):
        assert np.array_equal(weights_of(cut, name), weights_of(whole, name))
    assert not (cut / "lr_checkpoint").exists()


def test_a_batch_that_no_rank_can_fill_is_told(tmp_path: Path) -> None:
    write_log(tmp_path)
    error = fit(spec_of(tmp_path, batch_size=5000))["error"]
    assert "lr.batch_size is 5000, but one of 1 ranks gets only 1,800 of 1,800 train rows" in error


def test_absent_weights_shrink_as_if_every_step_had_touched_all_of_them() -> None:
    """Against FTRL-Proximal as published, every coordinate at every step, in float64."""
    d, steps_per_epoch, epochs, rate, penalties = 30, 20, 3, 0.3, np.array([0.5, 7.0])
    total = steps_per_epoch * epochs
    random = np.random.default_rng(1)
    lazy = ProximalAdagrad(
        d, penalties.tolist(), rate, steps_per_epoch, epochs, torch.device("cpu")
    )
    z, squares = np.zeros((d, 2)), np.zeros((d, 2))
    proximal, weights = np.full((d, 2), 1 / rate), np.zeros((d, 2))
    for step in range(total):
        ids = np.flatnonzero(random.random(d) < np.linspace(0.02, 1, d))
        gradients = random.normal(size=(len(ids), 2))
        lazy.step(torch.from_numpy(ids), torch.from_numpy(gradients).float(), torch.zeros(2))
        squares[ids] += gradients**2
        new = (1 + np.sqrt(squares[ids])) / (rate * (1 - step / total))
        z[ids] += gradients - (new - proximal[ids]) * weights[ids]
        proximal[ids] = new
        # For every coordinate, present or not: the penalty grows with the passes.
        weights = -z / (proximal + penalties * max(1, (step + 1) / steps_per_epoch))
    assert lazy.read(torch.arange(d)).numpy() == pytest.approx(weights, abs=1e-4)
    lazy.settle()
    assert lazy.weights.numpy() == pytest.approx(weights, abs=1e-4)
    assert np.abs(weights).max() > 0.1


@pytest.mark.parametrize(
    ("by", "d", "chosen"),
    [
        ("mllib", 1_000_000, "mllib"),
        ("auto", 1_000_000, "mllib"),
        ("auto", 100_000_000, "torch"),
        ("torch", 10, "torch"),
    ],
)
def test_auto_takes_torch_where_the_driver_is_too_small(
    by: str, d: int, chosen: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "lc_spark"):
        assert lr_choice.chosen(Lr.model_validate({"by": by}), d, 2, 4 * 2**30) == chosen
    if by == "auto":
        gigabytes = lr_choice.mllib_bytes(d, 2) / 1e9
        assert f"by {chosen}: MLlib's LR over {d:,} features needs {gigabytes:,.2f} GB" in (
            caplog.text
        )
        assert "which has 4.29 GB" in caplog.text


def test_mllib_is_refused_before_the_driver_runs_out_of_memory() -> None:
    with pytest.raises(LcSparkError, match=r"100,000,000 features needs .* lr\.by=torch"):
        lr_choice.chosen(Lr(by="mllib"), 100_000_000, 0, 4 * 2**30)


@pytest.fixture(scope="module")
def flights(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, dict[str, Any]]:
    """A sample of the flights from ingest to evaluation, with a start from folds and from days."""
    folder = tmp_path_factory.mktemp("flights_by_torch")
    datasets.flights().sample(6_000, random_state=7).to_parquet(folder / "flights.parquet")
    systems = [
        "lr",
        {"system": "lc_dnn", "name": "folds"},
        {"system": "lc_dnn", "name": "past", "training": {"start": "lr_past", "days": 60}},
    ]
    fields: list[dict[str, Any]] = [
        {"name": "carrier", "kind": "categorical"},
        {"name": "dest", "kind": "categorical"},
        {"name": "hour", "kind": "categorical"},
        {"name": "temp", "kind": "bucketed"},
        {"name": "distance", "kind": "continuous"},
        {"kind": "crossed", "of": ["carrier", "dest"]},
    ]
    overrides = [
        f"fields={json.dumps(fields)}",
        f"workspace={folder / 'workspace'}",
        f"source.path={folder / 'flights.parquet'}",
        "source.dataset=null",
        f"systems={json.dumps(systems)}",
        "training.epochs=2",
        "training.batch_size=64",
        "lr.by=torch",
        "lr.l2=[1e-2, 1e-3]",
        "lr.batch_size=64",
    ]
    config = config_file.load(FLIGHTS, overrides)
    made = {
        name: pipeline.run_stage(name, spark, config)
        for name in ("ingest", "features", "train_lr", "train_lc", "evaluate")
    }
    return config, made


@pytest.mark.slow
def test_lr_scores_on_the_train_shards_have_the_auc_that_was_noted(
    spark: SparkSession, flights: tuple[Config, dict[str, Any]]
) -> None:
    config, made = flights
    folder = config.workspace_path / "models" / "lr_past_60"
    field_map = read_field_map(config)
    scores_df = score.shard_scores_df(spark, config, field_map, {"past": folder}, "train")
    dates_df = spark.read.parquet(str(config.workspace_path / "shards" / "split=train"))
    last = dates_df.agg(F.max("date")).first()
    assert last is not None
    late_df = dates_df.where(F.col("date") > last[0] - 60).select("row_id").distinct()
    auc = metrics.exact_auc(scores_df.join(late_df, "row_id", how="left_semi"))
    assert made["train_lr"]["aucs"]["lr_past_60"] == pytest.approx(auc, abs=1e-6)


@pytest.mark.slow
def test_the_pipeline_by_torch_gives_what_mllibs_gives(
    spark: SparkSession, flights: tuple[Config, dict[str, Any]]
) -> None:
    config, made = flights
    by_torch = made["train_lr"]
    assert by_torch["by"] == "torch"
    folders = sorted(path.name for path in (config.workspace_path / "models").iterdir())
    assert folders == ["folds", "lr", *(f"lr_fold_{i}" for i in range(5)), "lr_past_60", "past"]
    weights_df = tables.read(spark, config, "lr_weights")
    by_torch_rows = weights_df.select("field", "index", "value", "count").collect()
    results = json.loads((config.workspace_path / "report" / "results.json").read_text())
    quality = {line["system"]: line["auc"] for line in results["results"]}
    assert set(quality) == {"lr", "folds", "past"}
    assert min(quality.values()) > 0.6
    network, _ = models.load(config.workspace_path / "models" / "lr")
    assert isinstance(network, models.Lr)
    field_map = read_field_map(config)
    stored = {(r["field"], r["index"]): r["weight"] for r in weights_df.collect()}
    for info in field_map.fields:
        for index in range(info.size):
            expected = float(network.weight.detach()[info.offset + index])
            assert stored[info.name, index] == expected

    mllib = config.model_copy(update={"lr": config.lr.model_copy(update={"by": "mllib"})})
    by_mllib = pipeline.run_stage("train_lr", spark, mllib)
    assert set(by_mllib) == set(by_torch)
    assert by_mllib["by"] == "mllib"
    assert set(by_mllib["aucs"]) == set(by_torch["aucs"])
    assert set(by_mllib["valid_logloss_by_l2"]) == set(by_torch["valid_logloss_by_l2"])
    mllib_df = tables.read(spark, config, "lr_weights")
    assert mllib_df.schema == weights_df.schema
    mllib_rows = mllib_df.select("field", "index", "value", "count").collect()
    assert sorted(mllib_rows) == sorted(by_torch_rows)
    assert len(by_torch_rows) == field_map.d
    assert all(row["value"] is not None for row in by_torch_rows)
    noted = facts.read(config, "train_lr")
    assert min(by_torch["valid_logloss_by_l2"].values()) == pytest.approx(
        min(by_mllib["valid_logloss_by_l2"].values()), abs=0.005
    )
    assert noted["l2"] == by_mllib["l2"]


@pytest.mark.slow
def test_steps_that_are_too_long_are_told(
    spark: SparkSession, flights: tuple[Config, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    config, made = flights
    assert made["train_lr"]["loss_history"][-1] < made["train_lr"]["loss_history"][0]
    long = config.lr.model_copy(update={"learning_rate": 1000.0})
    with caplog.at_level(logging.WARNING, "lc_spark"):
        worse = pipeline.run_stage("train_lr", spark, config.model_copy(update={"lr": long}))
    before, after = worse["loss_history"][0], worse["loss_history"][-1]
    assert after > before
    assert f"the objective grew from {before:.5f} to {after:.5f}" in caplog.text
    assert "Lower lr.learning_rate (1000)" in caplog.text
