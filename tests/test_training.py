import dataclasses
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyspark.sql import SparkSession
from safetensors.torch import load_file
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score
from training_data import FIELD_MAP, FOLDS, make_rows, make_spec, run_ranks, start_ranks, write_lr
from training_data import write_shards as write

from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.field_map import FieldMap
from lc_spark.parameters import parameter_count
from lc_spark.systems import Training
from lc_spark.training import checkpoint, loader, metrics, models
from lc_spark.training.launch import launch
from lc_spark.training.learner import schedule_factor
from lc_spark.training.loop import run_rank, train
from lc_spark.training.spec import TrainSpec, finished, note_state, noted_error

SIZES = {"train": (900, 900, 850, 900), "valid": (400, 401)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, FIELD_MAP, SIZES)
    return tmp_path


def trained(spec: TrainSpec) -> dict[str, torch.Tensor]:
    return load_file(Path(spec.output) / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# metrics


@pytest.mark.parametrize("levels", [2, 7, 1000])
def test_auc_with_ties_is_scikit_learns(levels: int) -> None:
    random = np.random.default_rng(levels)
    scores = random.integers(0, levels, 500) / levels
    labels = (random.random(500) < scores).astype(np.float32)
    assert metrics.auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_auc_by_hand() -> None:
    # pairs (positive, negative): (.9, .1) 1, (.9, .5) 1, (.5, .1) 1, (.5, .5) a half: 3.5 of 4
    assert metrics.auc(np.array([1, 0, 1, 0]), np.array([0.9, 0.1, 0.5, 0.5])) == 0.875
    assert np.isnan(metrics.auc(np.array([1, 1]), np.array([0.1, 0.2])))
    assert np.isnan(metrics.auc(np.array([]), np.array([])))


def test_log_loss_is_scikit_learns_and_does_not_overflow() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, 500)
    labels = random.integers(0, 2, 500)
    expected = sklearn_log_loss(labels, 1 / (1 + np.exp(-logits)))
    assert metrics.log_loss(labels, logits) == pytest.approx(expected, abs=1e-12)
    assert metrics.log_loss(np.array([0.0, 1.0]), np.array([1000.0, -1000.0])) == 1000.0


# one rank


def test_result_accounts_for_rows_and_keeps_the_best_epoch(folder: Path) -> None:
    result = train(make_spec(folder))
    assert result["steps_per_epoch"] == 3550 // 64
    assert result["rows_per_epoch"] == 55 * 64
    assert result["rows_left_over"] == 3550 - 55 * 64
    assert [entry["epoch"] for entry in result["epochs"]] == [1, 2, 3]
    best = max(result["epochs"], key=lambda entry: entry["valid_auc"])
    assert result["best_epoch"] == best["epoch"]
    assert result["parameters"] == parameter_count("lc_dnn", FIELD_MAP.d, 4, (16, 8)).total
    assert json.loads(json.dumps(result)) == result
    output = folder / "models" / "lc_dnn"
    assert sorted(p.name for p in output.iterdir()) == [
        "model.json",
        "model.safetensors",
        "result.json",
    ]
    # What was kept scores the valid split as the result says.
    model, description = models.load(output)
    assert description["fingerprint"] == FIELD_MAP.fingerprint
    assert description["best"]["epoch"] == result["best_epoch"]
    manifest = loader.read_manifest(folder / "shards", FIELD_MAP)
    labels, logits = [], []
    for batch in loader.evaluation_batches(
        folder / "shards", manifest, FIELD_MAP, "valid", 0, 1, 100
    ):
        labels.append(batch.labels.numpy())
        logits.append(model(batch.ids, batch.values).detach().numpy())
    auc = roc_auc_score(np.concatenate(labels), np.concatenate(logits))
    assert result["best_valid_auc"] == pytest.approx(auc, abs=1e-6)


def test_same_seed_gives_the_same_weights_and_another_does_not(folder: Path) -> None:
    spec = make_spec(folder, "lc_wd", epochs=1, dropout=0.2)
    other_seed = dataclasses.replace(spec, seed=8)
    runs = []
    for each in (spec, spec, other_seed):
        (Path(spec.output) / "result.json").unlink(missing_ok=True)
        train(each)
        runs.append(trained(each))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_frozen_m1_is_the_lr_to_the_end_and_lr_start_moves(folder: Path) -> None:
    weights = np.random.default_rng(0).normal(size=FIELD_MAP.d)
    write_lr(folder, FIELD_MAP, weights)
    kept = {}
    for start in ("frozen", "lr"):
        spec = make_spec(folder, "lc_wd", epochs=1, start=start)
        train(spec)
        kept[start] = trained(spec)
    frozen = kept["frozen"]["m1.weight"][:, 0].numpy()
    np.testing.assert_array_equal(frozen, weights.astype(np.float32))
    assert kept["frozen"]["wide"].any()
    moved = np.abs(kept["lr"]["m1.weight"][:, 0].numpy() - weights)
    assert 0.01 < moved.max() < 1


def test_padding_and_absent_features_stand_still(folder: Path) -> None:
    weights = np.random.default_rng(0).normal(size=FIELD_MAP.d)
    write_lr(folder, FIELD_MAP, weights)
    spec = make_spec(folder, epochs=1, start="lr", m1_weight_decay=0.1)
    # No row has tag 0 but as padding, once it is renamed.
    _rename_tag_0(folder / "shards")
    train(spec)
    m1 = trained(spec)["m1.weight"][:, 0].numpy()
    at = FIELD_MAP["tags"].offset
    assert m1[at] == np.float32(weights[at])
    assert m1[at + 1] != np.float32(weights[at + 1])


def _rename_tag_0(shards: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in shards.rglob("part-*.parquet"):
        table = pq.read_table(path, partitioning=None)
        tags = [[1 if tag == 0 else tag for tag in row] for row in table["tags"].to_pylist()]
        column = pa.array(tags, pa.list_(pa.int32()))
        table = table.set_column(table.schema.get_field_index("tags"), "tags", column)
        pq.write_table(table, path)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_every_precision_and_schedule_learns(folder: Path, precision: str, schedule: str) -> None:
    result = train(make_spec(folder, epochs=2, precision=precision, schedule=schedule))
    assert result["best_valid_auc"] > 0.7
    assert result["epochs"][1]["train_loss"] < result["epochs"][0]["train_loss"]


def test_schedule_goes_from_one_to_nearly_zero() -> None:
    assert [schedule_factor("constant", step, 4) for step in range(4)] == [1, 1, 1, 1]
    assert [schedule_factor("linear", step, 4) for step in range(4)] == [1, 0.75, 0.5, 0.25]
    cosine = [schedule_factor("cosine", step, 4) for step in range(4)]
    np.testing.assert_allclose(cosine, [1, 0.853553, 0.5, 0.146447], atol=1e-6)


def test_early_stop_after_patience_epochs_without_a_better_auc(folder: Path) -> None:
    # A learning rate that shakes the network about: no long row of better epochs.
    result = train(make_spec(folder, epochs=30, patience=1, learning_rate=0.3, schedule="constant"))
    aucs = [entry["valid_auc"] for entry in result["epochs"]]
    assert len(aucs) < 30
    assert result["best_epoch"] == len(aucs) - 1
    assert aucs[-1] <= aucs[-2] == max(aucs)


def test_nan_loss_names_the_step_and_keeps_the_last_checkpoint(folder: Path) -> None:
    spec = make_spec(folder, epochs=5, patience=5, batch_norm=False, schedule="constant")
    train(dataclasses.replace(spec, training={**spec.training, "epochs": 1}))
    spec.training["m1_learning_rate"] = 1e38
    with pytest.raises(LcSparkError, match=r"loss is (nan|inf) at step \d+"):
        train(spec)
    assert "loss is" in run_rank([dataclasses.asdict(spec)])[0]["error"]


def test_one_that_fails_leaves_the_others_be(folder: Path) -> None:
    bad = make_spec(folder, epochs=1, m1_learning_rate=1e38, batch_norm=False)
    good = dataclasses.replace(make_spec(folder, "dnn", epochs=1), output=str(folder / "good"))
    results = run_rank([dataclasses.asdict(bad), dataclasses.asdict(good)])
    assert "loss is" in results[0]["error"]
    assert results[1]["best_valid_auc"] > 0.6
    assert finished(bad) is None
    assert "loss is" in str(noted_error(bad))
    assert noted_error(good) is None
    assert finished(good) == results[1]


def test_a_finished_run_is_not_repeated_but_one_of_other_settings_is(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = make_spec(folder, epochs=1)
    first = train(spec)
    assert train(spec) == first
    assert "trained before with the same settings and data" in capsys.readouterr().out
    for other in (
        dataclasses.replace(spec, seed=8),
        dataclasses.replace(spec, training={**spec.training, "dropout": 0.5}),
        dataclasses.replace(spec, watch=("train",)),
    ):
        assert finished(other) is None
    manifest = folder / "shards" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")  # other data
    assert finished(spec) is None


def test_a_result_is_void_once_another_run_has_written_the_model(folder: Path) -> None:
    spec = make_spec(folder, epochs=1)
    train(spec)
    other = dataclasses.replace(spec, seed=8)
    note_state(other)  # what a killed run leaves
    assert finished(spec) is None
    assert noted_error(other) == ""
    assert noted_error(spec) is None
    train(spec)
    assert finished(spec) is not None
    model = Path(spec.output) / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    assert finished(spec) is None


def test_the_valid_split_is_looked_at_within_an_epoch(folder: Path) -> None:
    spec = dataclasses.replace(make_spec(folder, epochs=2, evaluations=3), watch=("train",))
    result = train(spec)
    points = [entry["epoch"] for entry in result["epochs"]]
    assert points == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert sum(entry["rows"] for entry in result["epochs"]) == 2 * result["rows_per_epoch"]
    assert all(0 < entry["train_auc"] < 1 for entry in result["epochs"])
    best = max(result["epochs"], key=lambda entry: entry["valid_auc"])
    assert result["best_epoch"] == best["epoch"]


def test_a_dnn_that_cannot_fit_is_refused_with_what_lc_dnn_needs(tmp_path: Path) -> None:
    large = dataclasses.replace(FIELD_MAP.fields[0], size=400_000_000)
    field_map = FieldMap((large, *FIELD_MAP.fields[1:]))
    write(tmp_path, field_map, {"train": (200,), "valid": (50,)})
    spec = make_spec(tmp_path, "dnn", hidden=[2048])
    # 400,000,039 x 2048 weights, 12 bytes each.
    said = r"dnn has 819,200,\d{3},\d{3} parameters and needs 9,830\.40 GB .* lc_dnn .* 4\.80 GB"
    with pytest.raises(LcSparkError, match=said):
        train(spec)


@pytest.mark.parametrize("system", ["lr_equivalent", "dnn", "lc_resnet", "wide_deep"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_every_other_system_learns(folder: Path, system: str, batch_norm: bool) -> None:
    settings: dict[str, Any] = {"epochs": 2, "batch_norm": batch_norm}
    if system == "lr_equivalent":
        write_lr(folder, FIELD_MAP, np.zeros(FIELD_MAP.d))
        settings["start"] = "lr"
    result = train(make_spec(folder, system, **settings))
    assert result["best_valid_auc"] > 0.65
    assert result["epochs"][1]["train_loss"] < result["epochs"][0]["train_loss"]
    model, _ = models.load(folder / "models" / system)
    assert result["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_dnns_padding_and_absent_features_stand_still(folder: Path) -> None:
    spec = make_spec(folder, "dnn", epochs=1, m1_weight_decay=0.1)
    torch.manual_seed(spec.seed)
    start = models.build("dnn", FIELD_MAP, Training.model_validate(spec.training))
    _rename_tag_0(folder / "shards")
    train(spec)
    before, after = start.tables[0].detach(), trained(spec)["first"]
    at = FIELD_MAP["tags"].offset
    assert torch.equal(after[at], before[at])
    assert not torch.equal(after[at + 1], before[at + 1])


def test_start_from_lr_without_an_lr_model_is_an_error(folder: Path) -> None:
    with pytest.raises(LcSparkError, match=r"no model in .*lr"):
        train(make_spec(folder, start="lr"))
    with pytest.raises(LcSparkError, match="no LR model"):
        train(dataclasses.replace(make_spec(folder, start="lr"), lr_model=None))


def test_valid_split_of_one_label_is_an_error(tmp_path: Path) -> None:
    manifest = write(tmp_path, FIELD_MAP, {"train": (200,), "valid": (50,)})
    manifest["splits"]["valid"]["positives"] = 0
    (tmp_path / "shards" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(LcSparkError, match="valid split has 50 rows, 0 of them positive"):
        train(make_spec(tmp_path))


# checkpoints


def test_checkpoint_of_another_run_is_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tensors = tmp_path / "checkpoint", {"a": torch.arange(3)}
    checkpoint.save(folder, 1, {"config": "x", "ranks": 2}, tensors, {"epochs": [1]})
    checkpoint.save(folder, 2, {"config": "x", "ranks": 2}, tensors, {"epochs": [1, 2]})
    assert [p.name for p in folder.iterdir()] == ["epoch-0002"]
    assert checkpoint.newest(folder, {"config": "x", "ranks": 2}) == 2
    loaded, progress = checkpoint.load(folder, 2, torch.device("cpu"))
    assert same(loaded, tensors)
    assert progress == {"epochs": [1, 2]}
    assert checkpoint.newest(folder, {"config": "y", "ranks": 2}) == 0
    assert "(config differ): set aside" in capsys.readouterr().out
    assert not folder.exists()
    assert (tmp_path / "checkpoint.set_aside" / "epoch-0002").is_dir()


def test_half_written_checkpoint_is_not_gone_on_from(tmp_path: Path) -> None:
    (tmp_path / "epoch-0003").mkdir()
    (tmp_path / "epoch-0003" / checkpoint.TENSORS_FILE).write_bytes(b"half")
    assert checkpoint.newest(tmp_path, {"config": "x"}) == 0
    checkpoint.save(tmp_path, 3, {"config": "x"}, {"a": torch.zeros(1)}, {})
    assert checkpoint.newest(tmp_path, {"config": "x"}) == 3


# several ranks, real processes


@pytest.mark.slow
@pytest.mark.parametrize("system", ["lc_dnn", "lc_wd"])
def test_two_ranks_come_close_to_the_best_possible_auc(tmp_path: Path, system: str) -> None:
    write(tmp_path, FIELD_MAP, {"train": (4000, 4000, 3900, 4100), "valid": (2000, 2001, 1)})
    rows = make_rows(20_000, 5)
    best = roc_auc_score(rows["label"], rows["true_logits"])
    linear = roc_auc_score(rows["label"], rows["linear"])
    assert linear + 0.1 < best
    result, output = run_ranks(make_spec(tmp_path, system, epochs=4), 2)
    assert best - 0.04 < result["best_valid_auc"] < best + 0.02
    assert result["rows_per_epoch"] == 2 * 64 * (7900 // 64)
    assert "15,744 rows seen, 256 left over" in output
    assert "\r" not in output
    assert "Warning" not in output


def kill_in_second_epoch(spec: TrainSpec, size: int) -> str:
    """Start ranks, SIGKILL the last one once the first epoch is behind it; return the output."""
    processes = start_ranks(spec, size)
    first = Path(spec.output) / "checkpoint" / "epoch-0001"
    second = first.with_name("epoch-0002")
    deadline = time.monotonic() + 600
    while not first.exists():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.005)
    time.sleep(0.2)
    os.kill(processes[-1].pid, signal.SIGKILL)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert processes[-1].returncode == -signal.SIGKILL
    assert all(process.returncode != 0 for process in processes)
    assert not second.exists()
    return outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "start"), [(2, "lr_cross_fitted"), (3, "lr")])
def test_killed_run_ends_with_the_weights_of_one_never_killed(
    tmp_path: Path, size: int, start: str
) -> None:
    sizes = {"train": (4000, 4000, 3900, 4100, 4000, 4000), "valid": (400, 401)}
    settings: dict[str, Any] = {"epochs": 3, "patience": 3, "dropout": 0.2, "channels": 2}
    settings |= {"hidden": [200, 200], "start": start, "batch_size": 128}
    settings |= {"m1": "joint", "evaluations": 2}
    specs = []
    for name in ("whole", "killed"):
        write(tmp_path / name, FIELD_MAP, sizes)
        write_lr(tmp_path / name, FIELD_MAP, np.linspace(-1, 1, FIELD_MAP.d))
        spec = make_spec(tmp_path / name, "lc_wd", **settings)
        folds = [np.linspace(fold, 1, FIELD_MAP.d) for fold in range(FOLDS)]
        lrs = [
            write_lr(tmp_path / name, FIELD_MAP, weights, f"lr_fold_{fold}")
            for fold, weights in enumerate(folds)
        ]
        held_out = tuple(lrs) if start == "lr_cross_fitted" else ()
        specs.append(dataclasses.replace(spec, held_out_lr=held_out))
    whole, _ = run_ranks(specs[0], size)
    kill_in_second_epoch(specs[1], size)
    resumed, output = run_ranks(specs[1], size)
    assert "going on from the checkpoint after epoch 1" in output
    assert same(trained(specs[0]), trained(specs[1]))
    for a, b in zip(whole["epochs"], resumed["epochs"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    assert not (Path(specs[1].output) / "checkpoint").exists()


@pytest.mark.slow
def test_torch_distributor_trains_in_local_mode(
    tmp_path: Path, spark: SparkSession, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, FIELD_MAP, SIZES)
    config = make_config(tmp_path, {"epochs": 2, "batch_size": 64, "hidden": [16, 8]})
    [result] = launch(spark, config, config.systems[:1], [None])
    assert result["rows_per_epoch"] == 2 * 64 * (1750 // 64)
    assert (tmp_path / "models" / "deep" / "model.safetensors").is_file()
    # Spark streams what ranks print to the driver's stderr.
    assert "deep epoch 2/2: train loss" in capfd.readouterr().err
    # The same ranks without Spark end with the same weights.
    with_spark = load_file(tmp_path / "models" / "deep" / "model.safetensors")
    spec = dataclasses.replace(
        make_spec(tmp_path, epochs=2), seed=config.seed, output=str(tmp_path / "again")
    )
    again, _ = run_ranks(spec, 2)
    assert same(with_spark, trained(spec))
    assert again["best_valid_auc"] == result["best_valid_auc"]
    broken = make_config(tmp_path, {"m1_learning_rate": 1e38, "batch_norm": False})
    [result] = launch(spark, broken, broken.systems[:1], [None])
    assert re.match(r"The loss is (nan|inf) at step", result["error"])
    many = make_config(tmp_path, {"ranks": 3})
    with pytest.raises(LcSparkError, match=r"training\.ranks is 3, but local\[2\] runs 2"):
        launch(spark, many, many.systems[:1], [None])


def make_config(folder: Path, training: dict[str, Any]) -> Config:
    return Config.model_validate(
        {
            "name": "made_up",
            "workspace": str(folder),
            "source": {"path": "nowhere"},
            "label": "label",
            "split": {"by": "hash"},
            "fields": [{"name": "site", "kind": "categorical"}],
            # The rest as training_data.make_spec has it.
            "training": {
                **{"ranks": 2, "start": "random", "learning_rate": 1e-3, "evaluations": 1},
                **training,
            },
            "systems": [{"system": "lc_dnn", "name": "deep"}],
        }
    )
