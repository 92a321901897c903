"""The one count of parameters: the paper's Table 3, and the tensors of a built network."""

import pytest

from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.parameters import parameter_count
from lc_spark.systems import SystemKind, Training
from lc_spark.training import models

FIELD_MAP = FieldMap(
    (
        FieldInfo("a", "categorical", 40),
        FieldInfo("b", "continuous", 2),
        FieldInfo("c", "multivalued", 50, max_values=3),
        FieldInfo("e", "bucketed", 3),
    )
)
NETWORKS: tuple[SystemKind, ...] = (
    "lr_equivalent", "dnn", "lc_dnn", "lc_wd", "lc_resnet", "wide_deep",
)  # fmt: skip
# d, f and the counts of the paper's Table 3 for K1, K2 = 2048, 1024.
APP_DATA = (8_672_633, 158)
FEEDS_DATA = (8_522_742, 2_311)


@pytest.mark.parametrize(
    ("system", "data", "expected"),
    [
        ("lr", APP_DATA, "8.67E+06"),
        ("dnn", APP_DATA, "1.78E+10"),
        ("lc_dnn", APP_DATA, "1.11E+07"),
        ("lc_wd", APP_DATA, "1.98E+07"),
        ("lr", FEEDS_DATA, "8.52E+06"),
        ("dnn", FEEDS_DATA, "1.75E+10"),
        ("lc_dnn", FEEDS_DATA, "1.54E+07"),
        ("lc_wd", FEEDS_DATA, "2.39E+07"),
    ],
)
def test_the_papers_table_3(system: SystemKind, data: tuple[int, int], expected: str) -> None:
    count = parameter_count(system, *data, (2048, 1024))
    assert f"{count.weights:.2E}" == expected
    assert f"{count.total:.2E}" == expected


@pytest.mark.parametrize("system", NETWORKS)
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("hidden", [(6,), (6, 5, 4)])
def test_the_count_is_the_sum_over_the_tensors(
    system: SystemKind, channels: int, batch_norm: bool, hidden: tuple[int, ...]
) -> None:
    if system in ("lr_equivalent", "dnn"):
        channels = 1
    settings = {"hidden": hidden, "channels": channels, "batch_norm": batch_norm}
    model = models.build(system, FIELD_MAP, Training.model_validate(settings))
    tensors = [parameter for _, parameter in model.named_parameters()]
    count = parameter_count(system, FIELD_MAP.d, 4, hidden, channels, batch_norm)
    assert count.total == sum(tensor.numel() for tensor in tensors)
    assert count.weights == sum(tensor.numel() for tensor in tensors if tensor.dim() == 2)


def test_lr_has_a_weight_a_feature_and_a_bias() -> None:
    count = parameter_count("lr", 95, 4, ())
    assert (count.weights, count.others) == (95, 1)
    assert count.total == sum(p.numel() for p in models.Lr(95).parameters())
