"""Turns global indices (and values) of one-hot rows into logits: LR, LC-DNN and LC-W&D.

Method: Chen et al., WWW 2017 Companion, doi 10.1145/3041021.3054227. Tensor names end in their
shape: B rows of a batch, C columns (one a field, max_values for a multivalued one), F fields,
K channels of the locally connected layer.
"""
# ruff: noqa: N803, N806, N815 (the shape suffixes are upper case)

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lc_spark.errors import LcSparkError
from lc_spark.field_map import MISSING, FieldMap
from lc_spark.systems import Training

MODEL_FILE = "model.safetensors"
DESCRIPTION_FILE = "model.json"

# About one step of M1 at its default learning rate: whatever was seen outweighs its random start.
RANDOM_SD = 0.01


class LocallyConnected(nn.Module):
    """M1 of l0 = M1'x: one block of weights a field, `channels` values a feature.

    Only the rows of M1 that a batch names are read, so that a step never touches all d of them.
    """

    field_of_C: Tensor

    def __init__(self, d: int, columns: Sequence[int], channels: int) -> None:
        """Make M1 [d, channels]; columns[i] is the number of columns of field i."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d, channels))
        nn.init.normal_(self.weight, std=RANDOM_SD)
        self.fields = len(columns)
        fields_F = torch.arange(self.fields)
        field_of_C = torch.repeat_interleave(fields_F, torch.tensor(list(columns)))
        self.register_buffer("field_of_C", field_of_C, persistent=False)

    def forward(self, ids_BC: Tensor, values_BC: Tensor | None) -> Tensor:
        """Return l0 [B, F, K]: the weights of a row's features times their values, by field."""
        return self.combine(self.weight[ids_BC], values_BC)

    def combine(self, rows_BCK: Tensor, values_BC: Tensor | None) -> Tensor:
        """Return l0 [B, F, K] of rows of M1 that were already gathered."""
        if values_BC is not None:
            rows_BCK = rows_BCK * values_BC.unsqueeze(-1)
        if rows_BCK.shape[1] == self.fields:
            return rows_BCK
        l0_BFK = rows_BCK.new_zeros(rows_BCK.shape[0], self.fields, rows_BCK.shape[2])
        return l0_BFK.index_add_(1, self.field_of_C, rows_BCK)


class Mlp(nn.Module):
    """What follows l0: hidden layers of Linear, BatchNorm, ReLU, Dropout, then one logit.

    With batch_norm l0 is normalised too, without a scale or shift of its own (the next layer has
    them): the start of M1 may then be of any scale, LR's sd near 1 or a small random one.
    """

    def __init__(
        self, inputs: int, hidden: Sequence[int], batch_norm: bool, dropout: float
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        if batch_norm:
            layers.append(nn.BatchNorm1d(inputs, affine=False))
        for size in hidden:
            layers.append(nn.Linear(inputs, size, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm1d(size))
            layers.append(nn.ReLU())
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
            inputs = size
        layers.append(nn.Linear(inputs, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, l0_BFK: Tensor) -> Tensor:
        """Return logits [B]."""
        return self.layers(l0_BFK).squeeze(-1)  # type: ignore[no-any-return]


class LcNetwork(nn.Module):
    """LC-DNN (the paper's section 2): l0 = M1'x, then an MLP; LC-W&D adds a linear part over x."""

    def __init__(
        self,
        d: int,
        columns: Sequence[int],
        hidden: Sequence[int],
        channels: int,
        batch_norm: bool,
        dropout: float,
        wide: bool,
    ) -> None:
        """Make the network for d features in len(columns) fields; see LocallyConnected and Mlp.

        The wide weights start at zero: M1 already carries what LR knows, and a linear part that
        began with it too would count it twice. It learns what the deep part leaves.
        """
        super().__init__()
        self.system = "lc_wd" if wide else "lc_dnn"
        self.architecture: dict[str, Any] = {
            "d": d,
            "columns": list(columns),
            "hidden": list(hidden),
            "channels": channels,
            "batch_norm": batch_norm,
            "dropout": dropout,
            "wide": wide,
        }
        self.m1 = LocallyConnected(d, columns, channels)
        self.wide = nn.Parameter(torch.zeros(d, 1)) if wide else None
        self.mlp = Mlp(len(columns) * channels, hidden, batch_norm, dropout)

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
        logits_B: Tensor = self.mlp(self.m1.combine(rows[0], values_BC))
        if self.wide is not None:
            logits_B = logits_B + _weighted_sum(rows[1].squeeze(-1), values_BC)
        return logits_B


class Lr(nn.Module):
    """Logistic regression as a torch model, so that it is stored and scored as the others are."""

    system = "lr"

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


Network = LcNetwork | Lr


def build(
    system: Literal["lr", "lc_dnn", "lc_wd"], field_map: FieldMap, training: Training
) -> Network:
    """Return the untrained network of a system, its random parts drawn from torch's generator."""
    if system == "lr":
        return Lr(field_map.d)
    return LcNetwork(
        d=field_map.d,
        columns=[info.max_values for info in field_map.fields],
        hidden=training.hidden,
        channels=training.channels,
        batch_norm=training.batch_norm,
        dropout=training.dropout,
        wide=system == "lc_wd",
    )


def start_from_lr(
    model: LcNetwork, lr_weights: Tensor, start: Literal["lr", "random", "frozen"]
) -> None:
    """Set M1's channel 0 to the LR weights [d] (start lr or frozen); frozen also keeps M1 so.

    Further channels stay small and random, so that they are free to learn what LR cannot say.
    """
    if start == "random":
        return
    if lr_weights.shape != model.m1.weight.shape[:1]:
        raise LcSparkError(
            f"The LR model has {len(lr_weights):,} weights, M1 needs {len(model.m1.weight):,}: "
            "run the train_lr stage again."
        )
    with torch.no_grad():
        model.m1.weight[:, 0] = lr_weights
    model.m1.weight.requires_grad_(start != "frozen")


def parameter_count(system: str, d: int, f: int, hidden: Sequence[int], channels: int) -> int:
    """Count the weights by the paper's formulas (its Table 1), the output layer included.

    LR: d. LC-DNN, for k channels and hidden layers K1..Kn: d k + f k K1 + K1 K2 + ... + Kn. LC-W&D:
    d more. Biases and BatchNorm's scales and shifts, a few for each hidden unit, do not count.
    """
    if system == "lr":
        return d
    sizes = [f * channels, *hidden, 1]
    deep = sum(a * b for a, b in itertools.pairwise(sizes))
    return d * channels + deep + (d if system == "lc_wd" else 0)


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
    ids_BC = np.empty((rows, width), np.int64)
    values_BC = None
    if any(info.kind in ("continuous", "multivalued") for info in field_map.fields):
        values_BC = np.ones((rows, width), np.float32)
    at = 0
    for info in field_map.fields:
        column, part = encoded[info.name], slice(at, at + info.max_values)
        if info.kind == "continuous":
            missing_B = np.isnan(column)
            ids_BC[:, at] = info.offset + np.where(missing_B, MISSING, MISSING + 1)
            assert values_BC is not None
            values_BC[:, at] = np.where(missing_B, 1, column)
        elif info.kind == "multivalued":
            ids_BC[:, part] = info.offset + np.maximum(column, MISSING)
            assert values_BC is not None
            values_BC[:, part] = column >= MISSING
        else:
            ids_BC[:, at] = column
            ids_BC[:, at] += info.offset
        at += info.max_values
    return torch.from_numpy(ids_BC), None if values_BC is None else torch.from_numpy(values_BC)


def save(model: Network, folder: Path, fingerprint: str, extra: Mapping[str, Any]) -> None:
    """Write model.safetensors and model.json; extra are further JSON entries of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        **extra,
        "system": model.system,
        "architecture": model.architecture,
        "fingerprint": fingerprint,
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    # Written aside and renamed, so that a reader never meets half a file.
    save_file(tensors, folder / f"{MODEL_FILE}.new")
    os.replace(folder / f"{MODEL_FILE}.new", folder / MODEL_FILE)
    (folder / f"{DESCRIPTION_FILE}.new").write_text(json.dumps(description, indent=1), "utf-8")
    os.replace(folder / f"{DESCRIPTION_FILE}.new", folder / DESCRIPTION_FILE)


def load(folder: Path) -> tuple[Network, dict[str, Any]]:
    """Read what save wrote: the model in evaluation mode on the CPU, and model.json's content."""
    if not (folder / DESCRIPTION_FILE).is_file():
        raise LcSparkError(f"There is no model in {folder}: run the stage that trains it first.")
    description: dict[str, Any] = json.loads((folder / DESCRIPTION_FILE).read_text("utf-8"))
    kind = Lr if description["system"] == "lr" else LcNetwork
    model = kind(**description["architecture"])
    # assign keeps the precision of the file: LR's weights may be float64.
    model.load_state_dict(load_file(folder / MODEL_FILE), assign=True)
    return model.eval(), description
