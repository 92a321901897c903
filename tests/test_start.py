"""Where M1 begins: which LR a row reads, and what is left of it in the end."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from training_data import (
    DAYS,
    FIELD_MAP,
    FIRST_DATE,
    FOLDS,
    make_spec,
    run_ranks,
    write_lr,
    write_shards,
)

from lc_spark.errors import LcSparkError
from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.systems import Training
from lc_spark.training import loader, models
from lc_spark.training.learner import Learner
from lc_spark.training.loop import train
from lc_spark.training.spec import TrainSpec
from lc_spark.training.start import Copies, at_start
from lc_spark.training.world import World

ALONE = World(0, 1, torch.device("cpu"))
SIZES = {"train": (900, 850), "valid": (400, 401)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path, FIELD_MAP, SIZES)
    return tmp_path


def cross_fitted(folder: Path, system: str = "lc_dnn", **settings: Any) -> TrainSpec:
    """Return a spec whose LR of fold i has the weights 10 i + 0, 1, .. and that of all rows .5."""
    write_lr(folder, FIELD_MAP, np.full(FIELD_MAP.d, 0.5))
    folds = tuple(
        write_lr(folder, FIELD_MAP, 10 * fold + np.arange(FIELD_MAP.d) / 100, f"lr_fold_{fold}")
        for fold in range(FOLDS)
    )
    spec = make_spec(folder, system, start="lr_cross_fitted", **{"epochs": 1, **settings})
    return dataclasses.replace(spec, held_out_lr=folds)


def m1_of(spec: TrainSpec) -> NDArray[np.float32]:
    weights: NDArray[np.float32] = load_file(Path(spec.output) / "model.safetensors")[
        "m1.weight"
    ].numpy()
    return weights


@pytest.mark.parametrize("channels", [1, 3])
def test_a_row_reads_the_copy_whose_lr_has_not_seen_its_fold(folder: Path, channels: int) -> None:
    spec = cross_fitted(folder, channels=channels)
    settings = Training.model_validate(spec.training)
    model, copies = at_start(spec, settings, FIELD_MAP)
    assert isinstance(model, models.LcNetwork)
    assert copies is not None
    seen: list[torch.Tensor] = []
    model.m1.combine = lambda rows, values: seen.append(rows) or rows[:, :4]  # type: ignore[method-assign, assignment, func-returns-value]
    learner = Learner(model, settings, 10, ALONE, copies)
    manifest = loader.read_manifest(folder / "shards", FIELD_MAP)
    batches = loader.training_batches(folder / "shards", manifest, FIELD_MAP, 0, 1, 64, 1, 0)
    batch = next(batches)
    batches.close()
    learner.step(batch, 0)
    expected = 10.0 * (batch.row_ids % FOLDS).unsqueeze(1) + batch.ids / 100
    assert torch.equal(batch.folds, batch.row_ids % FOLDS)
    torch.testing.assert_close(seen[0][..., 0], expected.float())


@pytest.mark.parametrize("channels", [1, 3])
def test_frozen_copies_end_in_the_lr_of_all_rows(folder: Path, channels: int) -> None:
    spec = cross_fitted(folder, "lc_wd", channels=channels, m1="frozen", m1_weight_decay=0.01)
    result = train(spec)
    m1 = m1_of(spec)
    assert m1.shape == (FIELD_MAP.d, channels)  # one M1, whatever the folds
    assert (m1[:, 0] == 0.5).all()
    if channels > 1:
        untrained, _ = _start_of(spec)
        moved = np.abs(m1[:, 1:] - untrained.m1.weight.detach().numpy()[:, 1:])
        assert moved.max() > 0.01  # the other channels are trained as ever
    assert result["parameters"] == sum(
        t.numel() for t in models.load(Path(spec.output))[0].parameters()
    )


def _start_of(spec: TrainSpec) -> tuple[models.LcNetwork, Copies | None]:
    torch.manual_seed(spec.seed)
    model, copies = at_start(spec, Training.model_validate(spec.training), FIELD_MAP)
    assert isinstance(model, models.LcNetwork)
    return model, copies


def test_frozen_keeps_lr_in_channel_0_and_trains_the_others(folder: Path) -> None:
    write_lr(folder, FIELD_MAP, np.linspace(-1, 1, FIELD_MAP.d))
    spec = make_spec(folder, start="frozen", channels=2, epochs=1, m1_weight_decay=0.01)
    start, _ = _start_of(spec)
    train(spec)
    m1 = m1_of(spec)
    np.testing.assert_array_equal(m1[:, 0], np.linspace(-1, 1, FIELD_MAP.d).astype(np.float32))
    assert np.abs(m1[:, 1] - start.m1.weight.detach().numpy()[:, 1]).max() > 0.01


def test_an_early_stop_goes_on_with_the_joint_epochs(folder: Path) -> None:
    settings: dict[str, Any] = {
        "epochs": 12,
        "patience": 1,
        "learning_rate": 0.3,
        "schedule": "constant",
    }
    spec = cross_fitted(folder, m1="frozen", joint_epochs=1, evaluations=1, **settings)
    points = [entry["epoch"] for entry in train(spec)["epochs"]]
    assert points[-1] == 12
    assert len(points) < 12


def test_joint_copies_end_in_their_mean(folder: Path) -> None:
    spec = cross_fitted(folder, m1="joint", m1_learning_rate=1e-3)
    start, _ = _start_of(spec)
    mean = 10 * (FOLDS - 1) / 2 + np.arange(FIELD_MAP.d) / 100
    np.testing.assert_allclose(start.m1.weight.detach()[:, 0], mean, rtol=1e-5)
    train(spec)
    moved = np.abs(m1_of(spec)[:, 0] - mean)
    assert 1e-4 < moved.max() < 0.1


def test_joint_epochs_train_the_lr_of_all_rows_at_the_end(folder: Path) -> None:
    for evaluations in (1, 2):
        spec = cross_fitted(folder, epochs=3, patience=3, joint_epochs=1, evaluations=evaluations)
        result = train(spec)
        assert len(result["epochs"]) == 3 * evaluations
    whole = dataclasses.replace(spec, output=str(folder / "kept"))
    whole.training["joint_epochs"] = 0
    train(whole)
    assert (m1_of(whole)[:, 0] == 0.5).all()
    learner_end = _last_m1(folder)
    assert np.abs(learner_end - 0.5).max() > 0.001


def _last_m1(folder: Path) -> NDArray[np.float32]:
    """Return M1 after all epochs, the last of them joint, whether it was the best or not."""
    spec = cross_fitted(folder, epochs=2, joint_epochs=1)
    settings = Training.model_validate(spec.training)
    model, copies = at_start(spec, settings, FIELD_MAP)
    learner = Learner(model, settings, 60, ALONE, copies)
    manifest = loader.read_manifest(folder / "shards", FIELD_MAP)
    for epoch in (1, 2):
        if epoch == 2:
            learner.end_copies()
        batches = loader.training_batches(
            folder / "shards", manifest, FIELD_MAP, 0, 1, 64, epoch, 0
        )
        for step, batch in enumerate(batches):
            learner.step(batch, step)
    assert isinstance(model, models.LcNetwork)
    weights: NDArray[np.float32] = model.m1.weight.detach().numpy()[:, 0]
    return weights


def test_lr_past_trains_on_the_later_days_alone(folder: Path) -> None:
    manifest = loader.read_manifest(folder / "shards", FIELD_MAP)
    first = FIRST_DATE + DAYS - 3
    groups = loader.train_row_groups(folder / "shards", manifest, first)
    assert groups == [270, 255]
    seen: set[int] = set()
    for epoch in range(1, 6):
        for batch in loader.training_batches(
            folder / "shards", manifest, FIELD_MAP, 0, 1, 50, epoch, 0, first
        ):
            seen |= set(batch.row_ids.tolist())
    # Days go round from one row of a file to the next; a rest of 25 rows is left over an epoch.
    assert {i % 10 if i < 900 else (i - 900) % 10 for i in seen} == {7, 8, 9}
    assert len(seen) > 500
    write_lr(folder, FIELD_MAP, np.ones(FIELD_MAP.d))
    past = (write_lr(folder, FIELD_MAP, np.zeros(FIELD_MAP.d), "lr_past_3"),)
    spec = make_spec(folder, start="lr_past", days=3, epochs=1)
    spec = dataclasses.replace(spec, held_out_lr=past, first_date=first)
    result = train(spec)
    assert result["rows_per_epoch"] + result["rows_left_over"] == 525
    assert (m1_of(spec) == 1).all()


def test_a_start_without_its_lr_or_with_another_field_maps_is_refused(folder: Path) -> None:
    spec = make_spec(folder, start="lr_cross_fitted")
    with pytest.raises(LcSparkError, match=r"no model in .*lr"):
        train(spec)
    spec = dataclasses.replace(cross_fitted(folder), held_out_lr=())
    with pytest.raises(LcSparkError, match="start is lr_cross_fitted, but there is no LR model"):
        train(spec)
    spec = cross_fitted(folder)
    other = FieldMap(FIELD_MAP.fields[:2])
    write_lr(folder, other, np.zeros(other.d), "lr_fold_1")
    with pytest.raises(LcSparkError, match=f"carries the fingerprint {other.fingerprint}"):
        train(spec)


@pytest.mark.slow
def test_an_lr_of_other_rows_makes_a_better_start_than_one_of_the_same_rows(
    tmp_path: Path,
) -> None:
    """The leak: many rare values, LR fits them on its own rows and on no others."""
    n_values, n, n_fields = 1500, 6000, 4
    random = np.random.default_rng(0)
    field_map = FieldMap(
        tuple(FieldInfo(f"f{i}", "categorical", n_values, column=f"f{i}") for i in range(n_fields))
    )
    effects = random.normal(0, 1, (n_fields, n_values))
    values = random.integers(0, n_values, (n, n_fields)).astype(np.int32)
    logits = effects[np.arange(n_fields), values].sum(1)
    labels = (random.random(n) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    folds = np.arange(n) % FOLDS
    _write(tmp_path, field_map, values, labels, folds)
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(values).long(), n_values)
    x = one_hot.flatten(1).numpy().astype(np.float32)[: n // 2]
    y, fold_of = labels[: n // 2], folds[: n // 2]
    everywhere = LogisticRegression(C=10, max_iter=100).fit(x, y)
    write_lr(tmp_path, field_map, everywhere.coef_[0])
    held_out = tuple(
        write_lr(
            tmp_path,
            field_map,
            LogisticRegression(C=10, max_iter=100)
            .fit(x[fold_of != fold], y[fold_of != fold])
            .coef_[0],
            f"lr_fold_{fold}",
        )
        for fold in range(FOLDS)
    )
    losses = {}
    for start in ("lr", "lr_cross_fitted"):
        spec = make_spec(tmp_path, start=start, epochs=3, batch_size=32)
        spec = dataclasses.replace(spec, held_out_lr=held_out if "cross" in start else ())
        losses[start] = train(spec)["epochs"][-1]
    assert losses["lr"]["train_loss"] < 0.4 < losses["lr_cross_fitted"]["train_loss"]
    gain = losses["lr"]["valid_logloss"] - losses["lr_cross_fitted"]["valid_logloss"]
    assert gain > 0.015


def _write(
    folder: Path,
    field_map: FieldMap,
    values: NDArray[np.int32],
    labels: NDArray[np.float32],
    folds: NDArray[Any],
) -> None:
    """Write the first half of the rows as the train split, the second as valid."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    field_map.write(folder / "field_map.json")
    half = len(labels) // 2
    splits = {}
    for split, rows in (("train", slice(0, half)), ("valid", slice(half, None))):
        columns: dict[str, Any] = {
            "row_id": np.arange(len(labels))[rows],
            "label": labels[rows],
            "fold": folds[rows].astype(np.int32),
        }
        columns |= {info.name: values[rows, i] for i, info in enumerate(field_map.fields)}
        path = folder / "shards" / f"split={split}" / "part-0.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table(columns), path)
        positives = int(labels[rows].sum())
        splits[split] = {"rows": half, "positives": positives, "row_groups": [half]}
    manifest = {"fingerprint": field_map.fingerprint, "splits": splits}
    (folder / "shards" / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
@pytest.mark.parametrize("m1", ["frozen", "joint"])
def test_two_ranks_train_copies_alike(tmp_path: Path, m1: str) -> None:
    write_shards(tmp_path, FIELD_MAP, SIZES)
    spec = cross_fitted(tmp_path, m1=m1, channels=2, epochs=2, joint_epochs=m1 == "frozen")
    result, output = run_ranks(spec, 2)
    assert result["epochs"][-1]["epoch"] == 2
    first = load_file(Path(spec.output) / "model.safetensors")
    (Path(spec.output) / "result.json").unlink()
    run_ranks(spec, 2)
    again = load_file(Path(spec.output) / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert "Warning" not in output
