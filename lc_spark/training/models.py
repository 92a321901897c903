"""Turns global indices (and values) of one-hot rows into logits: LR, DNN and the LC family.

Method: Chen et al., WWW 2017 Companion, doi 10.1145/3041021.3054227. Tensor names end in their
shape, as in layers.
"""
# ruff: noqa: N803, N806 (the shape suffixes are upper case)

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lc_spark import files
from lc_spark.errors import LcSparkError
from lc_spark.field_map import MISSING, FieldMap
from lc_spark.files import AnyPath
from lc_spark.systems import SystemKind, Training
from lc_spark.training.layers import FieldSum, LocallyConnected, Mlp, PooledMlp, ResidualMlp
from lc_spark.training.tensors import load_tensors, save_tensors

MODEL_FILE = "model.safetensors"
DESCRIPTION_FILE = "model.json"


class LcNetwork(nn.Module):
    """The LC family over l0 = M1'x: LC-DNN (the paper's section 2), LC-W&D, LC-ResNet, and M1 M2.

    lc_wd, or wide_deep, adds a linear part over x. lr_equivalent is the paper's Fig. 1.
    """

    def __init__(
        self,
        system: SystemKind,
        d: int,
        columns: Sequence[int],
        hidden: Sequence[int],
        channels: int,
        batch_norm: bool,
        dropout: float,
    ) -> None:
        """Make the network for d features in len(columns) fields; see LocallyConnected and Mlp.

        The wide weights start at zero: M1 already carries what LR knows, and a linear part that
        began with it too would count it twice. It learns what the deep part leaves.
        """
        super().__init__()
        self.system = system
        self.architecture: dict[str, Any] = {
            "system": system,
            "d": d,
            "columns": list(columns),
            "hidden": list(hidden),
            "channels": channels,
            "batch_norm": batch_norm,
            "dropout": dropout,
        }
        self.m1 = LocallyConnected(d, columns, channels)
        wide = system in ("lc_wd", "wide_deep")
        self.wide = nn.Parameter(torch.zeros(d, 1)) if wide else None
        if system == "lr_equivalent":
            self.deep: nn.Module = FieldSum()
        else:
            kind = ResidualMlp if system == "lc_resnet" else Mlp
            self.deep = kind(len(columns) * channels, hidden, batch_norm, dropout)

    @property
    def tables(self) -> list[nn.Parameter]:
        """The weights that are read by id, [d, k] each: M1, then the wide part if there is one."""
        return [self.m1.weight] if self.wide is None else [self.m1.weight, self.wide]

    def forward(self, ids_BC: Tensor, values_BC: Tensor | None) -> Tensor:
        """Return logits [B]; values of None stand for ones."""
        return self.from_rows([table[ids_BC] for table in self.tables], values_BC)

    def from_rows(self, rows: Sequence[Tensor], values_BC: Tensor | None) -> Tensor:
        """Return logits [B] of gathered rows [B, C, k], one entry a table.

        Training gathers the rows itself, so that their gradients stay as small as the batch.
        """
        logits_B: Tensor = self.deep(self.m1.combine(rows[0], values_BC))
        if self.wide is not None:
            logits_B = logits_B + _weighted_sum(rows[1].squeeze(-1), values_BC)
        return logits_B


class Dnn(nn.Module):
    """The paper's DNN: l1 = g(W1'x + b1) with W1 of d x K1, as a sum of the rows that x names."""

    system: SystemKind = "dnn"

    def __init__(
        self, d: int, columns: int, hidden: Sequence[int], batch_norm: bool, dropout: float
    ) -> None:
        """Make the network for d features, at most `columns` of them in a row."""
        super().__init__()
        self.architecture: dict[str, Any] = {
            "d": d,
            "columns": columns,
            "hidden": list(hidden),
            "batch_norm": batch_norm,
            "dropout": dropout,
        }
        self.first = nn.Parameter(torch.empty(d, hidden[0]))
        # As nn.Linear would over the inputs that are not zero.
        nn.init.uniform_(self.first, -(columns**-0.5), columns**-0.5)
        self.deep = PooledMlp(hidden, batch_norm, dropout)

    @property
    def tables(self) -> list[nn.Parameter]:
        """The weights that are read by id: W1 [d, K1]."""
        return [self.first]

    def forward(self, ids_BC: Tensor, values_BC: Tensor | None) -> Tensor:
        """Return logits [B]; values of None stand for ones."""
        return self.from_distinct(self.first, ids_BC, values_BC)

    def from_distinct(self, rows: Tensor, places_BC: Tensor, values_BC: Tensor | None) -> Tensor:
        """Return logits [B] of rows [n, K1] of W1 and the place of each feature among them.

        A row of W1 has K1 values, so that one a feature of the batch would be too much to hold.
        """
        sums_BH = nn.functional.embedding_bag(
            places_BC, rows, mode="sum", per_sample_weights=values_BC
        )
        return self.deep(sums_BH)  # type: ignore[no-any-return]


class Lr(nn.Module):
    """Logistic regression as a torch model, so that it is stored and scored as the others are."""

    system: SystemKind = "lr"

    def __init__(self, d: int) -> None:
        super().__init__()
        self.architecture = {"d": d}
        self.weight = nn.Parameter(torch.zeros(d))
        self.bias = nn.Parameter(torch.zeros(()))

    @classmethod
    def from_weights(cls, weight: NDArray[Any], bias: float) -> "Lr":
        """Return the LR with the given weights [d], in their own precision."""
        model = cls(len(weight))
        model.weight = nn.Parameter(torch.from_numpy(np.array(weight)))
        model.bias = nn.Parameter(torch.tensor(bias, dtype=model.weight.dtype))
        return model

    def forward(self, ids_BC: Tensor, values_BC: Tensor | None) -> Tensor:
        """Return logits [B]."""
        return _weighted_sum(self.weight[ids_BC], values_BC) + self.bias


def _weighted_sum(rows_BC: Tensor, values_BC: Tensor | None) -> Tensor:
    return (rows_BC if values_BC is None else rows_BC * values_BC).sum(1)


TrainedNetwork = LcNetwork | Dnn
Network = TrainedNetwork | Lr


def build(system: SystemKind, field_map: FieldMap, training: Training) -> TrainedNetwork:
    """Return the untrained network of a system, its random parts drawn from torch's generator."""
    columns = [info.max_values for info in field_map.fields]
    hidden, batch_norm, dropout = training.hidden, training.batch_norm, training.dropout
    if system == "dnn":
        return Dnn(field_map.d, sum(columns), hidden, batch_norm, dropout)
    return LcNetwork(system, field_map.d, columns, hidden, training.channels, batch_norm, dropout)


def start_from_lr(model: LcNetwork, lr: Lr) -> None:
    """Set M1's channel 0 to the weights [d] of an LR; and the bias, where the LR is the network.

    Further channels stay small and random, so that they are free to learn what LR cannot say.
    """
    if lr.weight.shape != model.m1.weight.shape[:1]:
        raise LcSparkError(
            f"The LR model has {len(lr.weight):,} weights, M1 needs {len(model.m1.weight):,}: "
            "run the train_lr stage again."
        )
    with torch.no_grad():
        model.m1.weight[:, 0] = lr.weight
        if isinstance(model.deep, FieldSum):
            model.deep.bias.copy_(lr.bias)


def to_tensors(
    encoded: Mapping[str, NDArray[Any]], field_map: FieldMap
) -> tuple[Tensor, Tensor | None]:
    """Turn encoded columns (as encoder.encode returns them) into model input.

    Returns ids int64 [B, C], global, and values float32 [B, C]; None when every value is 1. A
    missing continuous value becomes its field's feature 0 with value 1, another one feature 1 times
    the value; padding of a multivalued field has value 0.
    """
    rows = len(encoded[field_map.fields[0].name])
    width = sum(info.max_values for info in field_map.fields)
    # A column after the other in memory: each is written, and its part of M1 read, in one go.
    ids_CB = np.empty((width, rows), np.int64)
    values_CB = None
    if any(info.kind in ("continuous", "multivalued") for info in field_map.fields):
        values_CB = np.ones((width, rows), np.float32)
    at = 0
    for info in field_map.fields:
        column = encoded[info.name]
        if info.kind == "continuous":
            missing_B = np.isnan(column)
            ids_CB[at] = info.offset + np.where(missing_B, MISSING, MISSING + 1)
            assert values_CB is not None
            values_CB[at] = np.where(missing_B, 1, column)
        elif info.kind == "multivalued":
            part = slice(at, at + info.max_values)
            ids_CB[part] = info.offset + np.maximum(column, MISSING).T
            assert values_CB is not None
            values_CB[part] = (column >= MISSING).T
        else:
            np.add(column, info.offset, out=ids_CB[at])
        at += info.max_values
    ids_BC = torch.from_numpy(ids_CB).t()
    return ids_BC, None if values_CB is None else torch.from_numpy(values_CB).t()


def save(model: Network, folder: AnyPath, fingerprint: str, extra: Mapping[str, Any]) -> None:
    """Write model.safetensors and model.json; extra are further JSON entries of the latter."""
    description = {
        **extra,
        "system": model.system,
        "architecture": model.architecture,
        "fingerprint": fingerprint,
    }
    (folder / DESCRIPTION_FILE).unlink(missing_ok=True)  # it must not speak of other weights
    save_tensors(model.state_dict(), folder / MODEL_FILE)
    files.write_text(folder / DESCRIPTION_FILE, json.dumps(description, indent=1))


def load(folder: AnyPath) -> tuple[Network, dict[str, Any]]:
    """Read what save wrote: the model in evaluation mode on the CPU, and model.json's content."""
    if not (folder / DESCRIPTION_FILE).is_file():
        raise LcSparkError(f"There is no model in {folder}: run the stage that trains it first.")
    description: dict[str, Any] = json.loads((folder / DESCRIPTION_FILE).read_text("utf-8"))
    kind = {"lr": Lr, "dnn": Dnn}.get(description["system"], LcNetwork)
    model: Network = kind(**description["architecture"])
    # assign keeps the precision of the file: LR's weights may be float64.
    model.load_state_dict(load_tensors(folder / MODEL_FILE), assign=True)
    return model.eval(), description
