"""The layers that networks are made of: M1, and what turns its output into a logit.

Tensor names end in their shape: B rows of a batch, C columns (one a field, max_values for a
multivalued one), F fields, K channels of the locally connected layer, H units of a hidden layer.
"""
# ruff: noqa: N803, N806, N815 (the shape suffixes are upper case)

from collections.abc import Sequence

import torch
from torch import Tensor, nn

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
            return rows_BCK.contiguous()
        l0_BFK = rows_BCK.new_zeros(rows_BCK.shape[0], self.fields, rows_BCK.shape[2])
        return l0_BFK.index_add_(1, self.field_of_C, rows_BCK)


def activation(size: int, batch_norm: bool, dropout: float) -> list[nn.Module]:
    """Return what follows a product in a hidden layer of `size` units."""
    layers: list[nn.Module] = [nn.BatchNorm1d(size)] if batch_norm else []
    layers.append(nn.ReLU())
    return [*layers, nn.Dropout(dropout)] if dropout > 0 else layers


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
            layers += activation(size, batch_norm, dropout)
            inputs = size
        layers.append(nn.Linear(inputs, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, l0_BFK: Tensor) -> Tensor:
        """Return logits [B]."""
        return self.layers(l0_BFK).squeeze(-1)  # type: ignore[no-any-return]


class PooledMlp(nn.Module):
    """What follows W1'x in a DNN: bias or BatchNorm, ReLU, Dropout, further layers, a logit."""

    def __init__(self, hidden: Sequence[int], batch_norm: bool, dropout: float) -> None:
        super().__init__()
        self.bias = None if batch_norm else nn.Parameter(torch.zeros(hidden[0]))
        layers = activation(hidden[0], batch_norm, dropout)
        inputs = hidden[0]
        for size in hidden[1:]:
            layers.append(nn.Linear(inputs, size, bias=not batch_norm))
            layers += activation(size, batch_norm, dropout)
            inputs = size
        layers.append(nn.Linear(inputs, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, sums_BH: Tensor) -> Tensor:
        """Return logits [B]."""
        if self.bias is not None:
            sums_BH = sums_BH + self.bias
        return self.layers(sums_BH).squeeze(-1)  # type: ignore[no-any-return]


class ResidualMlp(nn.Module):
    """What follows l0 in LC-ResNet: a product to hidden[0] units, then one block a hidden size.

    Blocks are pre-activation (He et al. 2016, "Identity mappings in deep residual networks"):
    h + W2 g(W1 g(h)), with hidden[i] units inside block i.
    """

    def __init__(
        self, inputs: int, hidden: Sequence[int], batch_norm: bool, dropout: float
    ) -> None:
        super().__init__()
        width = hidden[0]
        first: list[nn.Module] = [nn.Flatten()]
        if batch_norm:
            first.append(nn.BatchNorm1d(inputs, affine=False))
        self.first = nn.Sequential(*first, nn.Linear(inputs, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *activation(width, batch_norm, 0.0),
                nn.Linear(width, inner, bias=not batch_norm),
                *activation(inner, batch_norm, dropout),
                nn.Linear(inner, width),
            )
            for inner in hidden
        )
        self.last = nn.Sequential(*activation(width, batch_norm, 0.0), nn.Linear(width, 1))

    def forward(self, l0_BFK: Tensor) -> Tensor:
        """Return logits [B]."""
        h_BH = self.first(l0_BFK)
        for block in self.blocks:
            h_BH = h_BH + block(h_BH)
        return self.last(h_BH).squeeze(-1)  # type: ignore[no-any-return]


class FieldSum(nn.Module):
    """M2 all ones, and a bias: what makes M1 M2 an LR (the paper's Fig. 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, l0_BFK: Tensor) -> Tensor:
        """Return logits [B]."""
        return l0_BFK.flatten(1).sum(1) + self.bias
