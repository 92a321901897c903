import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lc_spark.errors import LcSparkError
from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.systems import Training
from lc_spark.training import models

# a: 0..3, b (continuous): 4 missing, 5 value, c (multivalued): 6..10, e: 11..13
FIELD_MAP = FieldMap(
    (
        FieldInfo("a", "categorical", 4),
        FieldInfo("b", "continuous", 2),
        FieldInfo("c", "multivalued", 5, max_values=3),
        FieldInfo("e", "bucketed", 3),
    )
)
ENCODED: dict[str, NDArray[Any]] = {
    "a": np.array([0, 3, 1], np.int32),
    "b": np.array([np.nan, -1.5, 0.0], np.float32),
    "c": np.array([[0, -1, -1], [1, 4, -1], [2, 3, 4]], np.int32),
    "e": np.array([2, 0, 1], np.int32),
}
# The same three rows as x of d = 14, written out.
X = np.array(
    [
        #  a           b          c              e
        [1, 0, 0, 0, 1, 0.0, 1, 0, 0, 0, 0, 0, 0, 1],
        [0, 0, 0, 1, 0, -1.5, 0, 1, 0, 0, 1, 1, 0, 0],
        [0, 1, 0, 0, 0, 0.0, 0, 0, 1, 1, 1, 0, 1, 0],
    ],
    np.float32,
)
NORM = ("running_mean", "running_var", "weight", "bias")
BLOCKS = [slice(0, 4), slice(4, 6), slice(6, 11), slice(11, 14)]


def build(system: Any, **settings: Any) -> Any:
    torch.manual_seed(3)
    return models.build(system, FIELD_MAP, Training.model_validate({"hidden": [6, 5], **settings}))


def weights_of(model: torch.nn.Module) -> dict[str, NDArray[Any]]:
    return {name: t.detach().numpy() for name, t in model.state_dict().items()}


def l0_of(m1: NDArray[Any]) -> NDArray[Any]:
    """M1'x, block by block, one field after the other: [B, F, K]."""
    return np.stack([X[:, block] @ m1[block] for block in BLOCKS], axis=1)


def test_input_has_global_ids_and_the_values_of_continuous_and_padded_columns() -> None:
    ids, values = models.to_tensors(ENCODED, FIELD_MAP)
    assert values is not None
    assert ids.dtype == torch.int64
    assert values.dtype == torch.float32
    assert ids.tolist() == [[0, 4, 6, 6, 6, 13], [3, 5, 7, 10, 6, 11], [1, 5, 8, 9, 10, 12]]
    assert values.tolist() == [
        [1, 1, 1, 0, 0, 1],
        [1, -1.5, 1, 1, 0, 1],
        [1, 0, 1, 1, 1, 1],
    ]


def test_input_without_continuous_and_multivalued_fields_has_no_values() -> None:
    field_map = FieldMap((FIELD_MAP.fields[0], FIELD_MAP.fields[3]))
    ids, values = models.to_tensors(ENCODED, field_map)
    assert values is None
    assert ids.tolist() == [[0, 6], [3, 4], [1, 5]]


def test_offsets_beyond_int32_do_not_overflow() -> None:
    big = FieldMap((FieldInfo("a", "categorical", 2**31), FieldInfo("e", "categorical", 9)))
    ids, _ = models.to_tensors({"a": ENCODED["a"], "e": ENCODED["e"]}, big)
    assert ids[0].tolist() == [0, 2**31 + 2]


def test_lr_is_a_weighted_sum_over_x() -> None:
    weight = np.arange(14) / 7
    logits = models.Lr.from_weights(weight, -0.5)(*models.to_tensors(ENCODED, FIELD_MAP))
    assert logits.dtype == torch.float64
    np.testing.assert_allclose(logits.detach().numpy(), X @ weight - 0.5, rtol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_locally_connected_layer_is_block_diagonal(channels: int) -> None:
    model = build("lc_dnn", channels=channels)
    m1 = np.random.default_rng(0).normal(size=(14, channels)).astype(np.float32)
    model.m1.weight.data = torch.from_numpy(m1)
    l0 = model.m1(*models.to_tensors(ENCODED, FIELD_MAP)).detach().numpy()
    np.testing.assert_allclose(l0, l0_of(m1), rtol=1e-6)


@pytest.mark.parametrize("system", ["lc_dnn", "lc_wd"])
@pytest.mark.parametrize("channels", [1, 2])
def test_network_without_batch_norm_is_the_papers_formula(system: str, channels: int) -> None:
    model = build(system, channels=channels, batch_norm=False).eval()
    if system == "lc_wd":
        model.wide.data = torch.linspace(-1, 1, 14).unsqueeze(1)
    w = weights_of(model)
    l0 = l0_of(w["m1.weight"]).reshape(3, -1)
    l1 = np.maximum(l0 @ w["deep.layers.1.weight"].T + w["deep.layers.1.bias"], 0)
    l2 = np.maximum(l1 @ w["deep.layers.3.weight"].T + w["deep.layers.3.bias"], 0)
    logits = (l2 @ w["deep.layers.5.weight"].T + w["deep.layers.5.bias"])[:, 0]
    if system == "lc_wd":
        logits = logits + X @ w["wide"][:, 0]
    got = model(*models.to_tensors(ENCODED, FIELD_MAP)).detach().numpy()
    np.testing.assert_allclose(got, logits, rtol=1e-5, atol=1e-6)


def test_batch_norm_normalises_l0_and_each_hidden_layer() -> None:
    model = build("lc_dnn", batch_norm=True)
    model(*models.to_tensors(ENCODED, FIELD_MAP))  # moves the running statistics off 0 and 1
    model.eval()
    w = weights_of(model)

    def norm(x: NDArray[Any], layer: str) -> NDArray[Any]:
        mean, var = w[f"{layer}.running_mean"], w[f"{layer}.running_var"]
        scale, shift = w.get(f"{layer}.weight", np.ones(1)), w.get(f"{layer}.bias", np.zeros(1))
        result: NDArray[Any] = (x - mean) / np.sqrt(var + 1e-5) * scale + shift
        return result

    l0 = norm(l0_of(w["m1.weight"]).reshape(3, -1), "deep.layers.1")
    l1 = np.maximum(norm(l0 @ w["deep.layers.2.weight"].T, "deep.layers.3"), 0)
    l2 = np.maximum(norm(l1 @ w["deep.layers.5.weight"].T, "deep.layers.6"), 0)
    logits = (l2 @ w["deep.layers.8.weight"].T + w["deep.layers.8.bias"])[:, 0]
    got = model(*models.to_tensors(ENCODED, FIELD_MAP)).detach().numpy()
    np.testing.assert_allclose(got, logits, rtol=1e-4, atol=1e-6)


def test_dropout_acts_in_training_alone() -> None:
    model = build("lc_dnn", dropout=0.5, batch_norm=False)
    model.m1.weight.data.fill_(1.0)
    batch = models.to_tensors(ENCODED, FIELD_MAP)
    assert not torch.equal(model(*batch), model(*batch))
    model.eval()
    assert torch.equal(model(*batch), model(*batch))


def lr_of(weights: NDArray[Any], bias: float = 0.25) -> models.Lr:
    return models.Lr.from_weights(weights, bias)


def test_start_from_lr_sets_channel_0_and_leaves_the_others_small() -> None:
    model = build("lc_wd", channels=3)
    lr_weights = np.linspace(-2, 2, 14, dtype=np.float32)
    models.start_from_lr(model, lr_of(lr_weights))
    weight = model.m1.weight.detach()
    np.testing.assert_array_equal(weight[:, 0].numpy(), lr_weights)
    assert 0 < weight[:, 1:].abs().max() < 0.1
    assert not model.wide.any()


def test_random_start_is_small_and_not_zero() -> None:
    assert 0.001 < build("lc_dnn").m1.weight.std() < 0.1


def test_lr_weights_of_another_size_are_refused() -> None:
    with pytest.raises(LcSparkError, match="13 weights, M1 needs 14"):
        models.start_from_lr(build("lc_dnn"), lr_of(np.ones(13)))


def test_lr_equivalent_scores_as_lr_before_training() -> None:
    """The paper's Fig. 1: W = M1 M2, M2 all ones."""
    weights = np.random.default_rng(0).normal(size=14)
    model = build("lr_equivalent")
    models.start_from_lr(model, lr_of(weights, -0.7))
    batch = models.to_tensors(ENCODED, FIELD_MAP)
    ours = model(*batch).sigmoid().detach().numpy()
    theirs = lr_of(weights, -0.7)(*batch).sigmoid().detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert [name for name, _ in model.named_parameters()] == ["m1.weight", "deep.bias"]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_dnn_is_the_papers_formula(batch_norm: bool) -> None:
    model = build("dnn", batch_norm=batch_norm)
    model(*models.to_tensors(ENCODED, FIELD_MAP))
    model.eval()
    w = weights_of(model)
    assert w["first"].shape == (14, 6)

    def hidden(x: NDArray[Any], layer: int) -> NDArray[Any]:
        if batch_norm:
            norm = {name: w[f"deep.layers.{layer}.{name}"] for name in NORM}
            x = (x - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-5)
            x = x * norm["weight"] + norm["bias"]
        return np.maximum(x, 0)

    l1 = hidden(X @ w["first"] + (0 if batch_norm else w["deep.bias"]), 0)
    second, last = (2, 5) if batch_norm else (1, 3)
    l2 = l1 @ w[f"deep.layers.{second}.weight"].T
    l2 = hidden(l2 + (0 if batch_norm else w[f"deep.layers.{second}.bias"]), second + 1)
    logits = (l2 @ w[f"deep.layers.{last}.weight"].T + w[f"deep.layers.{last}.bias"])[:, 0]
    got = model(*models.to_tensors(ENCODED, FIELD_MAP)).detach().numpy()
    np.testing.assert_allclose(got, logits, rtol=1e-4, atol=1e-6)


def test_resnet_adds_each_block_to_what_it_was_given() -> None:
    model = build("lc_resnet", channels=2, batch_norm=False).eval()
    w = weights_of(model)

    def linear(x: NDArray[Any], layer: str) -> NDArray[Any]:
        result: NDArray[Any] = x @ w[f"deep.{layer}.weight"].T + w[f"deep.{layer}.bias"]
        return result

    h = linear(l0_of(w["m1.weight"]).reshape(3, -1), "first.1")
    for block in range(2):
        inner = linear(np.maximum(h, 0), f"blocks.{block}.1")
        assert inner.shape == (3, (6, 5)[block])
        h = h + linear(np.maximum(inner, 0), f"blocks.{block}.3")
    logits = linear(np.maximum(h, 0), "last.1")[:, 0]
    got = model(*models.to_tensors(ENCODED, FIELD_MAP)).detach().numpy()
    np.testing.assert_allclose(got, logits, rtol=1e-4, atol=1e-6)


SYSTEMS = ("lr", "lr_equivalent", "dnn", "lc_dnn", "lc_wd", "lc_resnet", "wide_deep")


@pytest.mark.parametrize("system", SYSTEMS)
def test_saved_model_scores_the_same_bit_for_bit(system: str, tmp_path: Path) -> None:
    model = lr_of(np.linspace(0, 1, 14)) if system == "lr" else build(system)
    batch = models.to_tensors(ENCODED, FIELD_MAP)
    model(*batch)
    model.eval()
    models.save(model, tmp_path, FIELD_MAP.fingerprint, {"auc": 0.75})
    loaded, description = models.load(tmp_path)
    assert torch.equal(loaded(*batch), model(*batch))
    assert not loaded.training
    assert description["system"] == system
    assert description["fingerprint"] == FIELD_MAP.fingerprint
    assert description["auc"] == 0.75
    assert description == json.loads((tmp_path / "model.json").read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_lr_keeps_its_double_precision_on_disk(tmp_path: Path) -> None:
    weight = np.full(14, 0.1)
    models.save(models.Lr.from_weights(weight, 0.1), tmp_path, FIELD_MAP.fingerprint, {})
    loaded, _ = models.load(tmp_path)
    assert isinstance(loaded, models.Lr)
    np.testing.assert_array_equal(loaded.weight.detach().numpy(), weight)
    assert loaded.bias.item() == 0.1


def test_missing_model_says_which_stage_to_run(tmp_path: Path) -> None:
    with pytest.raises(LcSparkError, match=r"no model in .*run the stage"):
        models.load(tmp_path / "nothing")


def test_one_max_value_multivalued_field_still_has_values() -> None:
    single = FieldMap((dataclasses.replace(FIELD_MAP.fields[2], max_values=1),))
    ids, values = models.to_tensors({"c": np.array([[2], [0]], np.int32)}, single)
    assert values is not None
    assert ids.tolist() == [[2], [0]]
    assert values.tolist() == [[1], [1]]
