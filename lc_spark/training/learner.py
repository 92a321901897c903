"""Turns batches into updates of one network: the step that every rank takes together.

What is read by id (M1, the wide weights, W1 of a DNN) goes through optim.RowAdam, the rest through
AdamW. The gradients of the rest travel as one vector, not through DistributedDataParallel: that
lays its buckets out anew after the first step, and with three ranks or more the order of a sum, and
so its last bits, then depends on where a run was killed.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lc_spark.errors import LcSparkError
from lc_spark.systems import Training
from lc_spark.training.loader import Batch
from lc_spark.training.models import Dnn, LcNetwork, TrainedNetwork
from lc_spark.training.optim import RowAdam, rows_of
from lc_spark.training.start import Copies
from lc_spark.training.world import World

# The parts of a state that have a row a feature.
TABLES = (
    "model.m1.", "model.wide", "model.first", "copies_by_feature",
    "rows.first.", "rows.second.", "copy_rows.first.", "copy_rows.second.",
)  # fmt: skip


class Read(NamedTuple):
    """Rows of tables that a step read, one leaf a table, and who updates them."""

    row_adam: RowAdam
    ids: Tensor  # [...], n in all
    leaves: list[Tensor]  # [..., k], n rows in all
    present: Tensor | None  # which of the n rows the batch really has; None: all of them

    def update(self, factor: float) -> None:
        """Pass the leaves' gradients on, those of absent rows left out."""
        gradients = [None if x.grad is None else x.grad.flatten(0, -2) for x in self.leaves]
        if all(gradient is None for gradient in gradients):
            return
        ids = self.ids
        if self.present is not None:
            ids = ids.flatten()[self.present]
            gradients = [None if g is None else g[self.present] for g in gradients]
        self.row_adam.step(ids, gradients, factor)


class Learner:
    """A network with its optimisers, over `total_steps` steps of the learning-rate schedule."""

    def __init__(
        self,
        model: TrainedNetwork,
        settings: Training,
        total_steps: int,
        world: World,
        copies: Copies | None = None,
    ) -> None:
        """Take a network that is the same on every rank; tables without gradient stay fixed."""
        self.model = model.to(world.device)
        self.settings, self.total_steps, self.world = settings, total_steps, world
        self.adamw = torch.optim.AdamW(
            model.deep.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.trained = [i for i, table in enumerate(model.tables) if table.requires_grad]
        self.row_adam = self._row_adam([model.tables[i] for i in self.trained])
        self.copies = copies
        if copies is not None:
            copies.to(world.device)
            if copies.final is None:
                copies.row_adam = self._row_adam([copies.table])

    def _row_adam(self, tables: list[Tensor]) -> RowAdam | None:
        rate, decay = self.settings.m1_learning_rate, self.settings.m1_weight_decay
        return RowAdam(tables, rate, decay, self.world) if tables else None

    def step(self, batch: Batch, step: int) -> float:
        """Update the weights by one batch a rank; return the mean loss over all their rows.

        Collective. BatchNorm normalises over a rank's own rows. A loss that is no number raises
        LcSparkError on every rank, before any update.
        """
        ids, values, labels = self.to_device(batch)
        bfloat16 = self.settings.precision == "bfloat16"
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=bfloat16):
            if isinstance(self.model, Dnn):
                logits, reads = self._read_distinct(self.model, ids, values)
            else:
                logits, reads = self._read_rows(self.model, batch, ids, values)
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels)
        self.adamw.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        mean_loss = self._average_gradients(loss)
        if not math.isfinite(mean_loss):
            raise LcSparkError(
                f"The loss is {mean_loss} at step {step}: lower training.learning_rate or "
                "training.m1_learning_rate. The checkpoint of the last whole epoch is kept."
            )
        factor = schedule_factor(self.settings.schedule, step, self.total_steps)
        for group in self.adamw.param_groups:
            group["lr"] = self.settings.learning_rate * factor
        self.adamw.step()
        for read in reads:
            read.update(factor)
        return mean_loss

    def _read_rows(
        self, model: LcNetwork, batch: Batch, ids: Tensor, values: Tensor | None
    ) -> tuple[Tensor, list[Read]]:
        """Return logits [B] of an LC network, and the rows that their gradients go to."""
        # Padding has value 0: its features are not in the row and stand still.
        present = None
        if values is not None and int(values.count_nonzero()) < values.numel():
            present = values.flatten().nonzero().squeeze(1)
        m1 = model.m1.weight
        further = m1.shape[1] > 1  # channels beside the one that copies stand in for
        ids_of_m1 = ids if self.copies is None or further else ids[:0]
        leaves = [
            _by_column(table.detach(), ids_of_m1 if table is m1 else ids) for table in model.tables
        ]
        for i in self.trained:
            leaves[i].requires_grad_()
        reads = []
        if self.row_adam is not None:
            trained = [leaves[i] for i in self.trained]
            reads.append(Read(self.row_adam, ids, trained, present))
        rows = list(leaves)
        if self.copies is not None:
            copy_ids = self.copies.ids(ids, batch.folds.to(self.world.device))
            leaf = _by_column(self.copies.table, copy_ids)
            if self.copies.row_adam is not None:
                leaf.requires_grad_()
                reads.append(Read(self.copies.row_adam, copy_ids, [leaf], present))
            rows[0] = torch.cat([leaf, leaves[0][..., 1:]], dim=-1) if further else leaf
        return model.from_rows(rows, values), reads

    def _read_distinct(
        self, model: Dnn, ids: Tensor, values: Tensor | None
    ) -> tuple[Tensor, list[Read]]:
        """Return logits [B] of a DNN, and the distinct rows that their gradients go to."""
        distinct, places = torch.unique(ids, return_inverse=True)
        leaf = model.first.detach()[distinct].requires_grad_()
        logits = model.from_distinct(leaf, places, values)
        assert self.row_adam is not None, "a DNN trains W1"
        present = None
        if values is not None:
            present = torch.zeros(len(distinct), dtype=torch.bool, device=distinct.device)
            present[places[values != 0]] = True
        return logits, [Read(self.row_adam, distinct, [leaf], present)]

    def settle(self) -> None:
        """Make the network's M1 what it would be if training ended here. Collective."""
        self.average_statistics()
        if self.copies is not None:
            assert isinstance(self.model, LcNetwork), "only the LC family has copies of M1"
            self.copies.settle(self.model.m1.weight)

    def end_copies(self) -> None:
        """Go on with one M1, trained with the rest."""
        self.settle()
        self.copies = None

    def _average_gradients(self, loss: Tensor) -> float:
        """Set the MLP's gradients to their mean over ranks; return the mean loss."""
        if self.world.size == 1:
            return loss.item()
        gradients = [p.grad for p in self.model.deep.parameters() if p.grad is not None]
        vector = torch.cat([parameters_to_vector(gradients), loss.detach().reshape(1)])
        vector = self.world.mean(vector)
        vector_to_parameters(vector[:-1], gradients)
        return float(vector[-1])

    def logits(self, batch: Batch) -> Tensor:
        """Return logits [B] without gradients, in float32 as scoring has them."""
        ids, values, _ = self.to_device(batch)
        with torch.no_grad():
            logits: Tensor = self.model(ids, values)
        return logits

    def to_device(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return ids, values and labels on this rank's device."""
        device = self.world.device
        values = None if batch.values is None else batch.values.to(device)
        return batch.ids.to(device), values, batch.labels.to(device)

    def average_statistics(self) -> None:
        """Set BatchNorm's running statistics to their mean over ranks. Collective."""
        for buffer in self.model.deep.buffers():
            if buffer.is_floating_point():
                self.world.mean(buffer)

    def state(self) -> dict[str, Tensor]:
        """Return all that a later step depends on, by name."""
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for i, state in self.adamw.state_dict()["state"].items():
            tensors |= {f"adamw.{i}.{key}": t for key, t in state.items()}
        if self.row_adam is not None:
            tensors |= {f"rows.{name}": t for name, t in self.row_adam.state().items()}
        if self.copies is not None and self.copies.row_adam is not None:
            tensors["copies_by_feature"] = self.copies.table
            tensors |= {f"copy_rows.{name}": t for name, t in self.copies.row_adam.state().items()}
        return tensors

    def take_over(self, tensors: dict[str, Tensor], places: Tensor) -> None:
        """Go on from what state returned in a run over fewer features.

        places int64 [n] says where each of its n features is among the d of this network; features
        that it did not have keep the start that they have here.
        """
        mine, d = self.state(), self.model.architecture["d"]
        missing = {name for name in mine if name not in tensors}
        if missing:
            raise LcSparkError(
                f"The model to go on from lacks {', '.join(sorted(missing))}: its settings differ. "
                "Set refresh.mode to scratch once."
            )
        grown = {}
        for name, old in tensors.items():
            new = mine.get(name)
            if new is None or not name.startswith(TABLES):
                grown[name] = old
            else:  # a feature has a row, or one for each fold
                by_feature = new.clone().view(d, -1, new.shape[1])
                by_feature[places] = old.view(len(places), *by_feature.shape[1:]).to(new.device)
                grown[name] = by_feature.view(new.shape)
        self.load_state(grown)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what state returned."""
        self.model.load_state_dict(_under("model.", tensors))
        adamw: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("adamw.", tensors).items():
            i, key = name.split(".")
            adamw.setdefault(int(i), {})[key] = tensor
        groups = self.adamw.state_dict()["param_groups"]
        self.adamw.load_state_dict({"state": adamw, "param_groups": groups})
        if self.row_adam is not None:
            self.row_adam.load_state(_under("rows.", tensors))
        if self.copies is not None and self.copies.row_adam is not None:
            self.copies.table.copy_(tensors["copies_by_feature"])
            self.copies.row_adam.load_state(_under("copy_rows.", tensors))


def _by_column(table: Tensor, ids: Tensor) -> Tensor:
    """Return table[ids], [B, C, k], read column by column: a field's rows lie together."""
    rows = rows_of(table, ids.t().flatten())
    return rows.view(ids.shape[1], ids.shape[0], table.shape[1]).transpose(0, 1)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def schedule_factor(
    schedule: Literal["constant", "linear", "cosine"], step: int, steps: int
) -> float:
    """Return what the learning rates are multiplied by at a step of 0 .. steps - 1."""
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1 - step / steps
    return (1 + math.cos(math.pi * step / steps)) / 2
