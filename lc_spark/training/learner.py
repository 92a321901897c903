"""Turns batches into updates of one LC network: the step that every rank takes together.

M1 and the wide weights go through optim.RowAdam, the MLP through AdamW. The MLP's gradients travel
as one vector, not through DistributedDataParallel: that lays its buckets out anew after the first
step, and with three ranks or more the order of a sum, and so its last bits, then depends on where a
run was killed.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lc_spark.errors import LcSparkError
from lc_spark.systems import Training
from lc_spark.training.loader import Batch
from lc_spark.training.models import LcNetwork
from lc_spark.training.optim import RowAdam
from lc_spark.training.world import World


class Learner:
    """A network with its optimisers, over `total_steps` steps of the learning-rate schedule."""

    def __init__(
        self, model: LcNetwork, settings: Training, total_steps: int, world: World
    ) -> None:
        """Take a network that is the same on every rank; tables without gradient stay fixed."""
        self.model = model.to(world.device)
        self.settings, self.total_steps, self.world = settings, total_steps, world
        self.adamw = torch.optim.AdamW(
            model.mlp.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.trained = [i for i, table in enumerate(model.tables) if table.requires_grad]
        self.row_adam = None
        if self.trained:
            self.row_adam = RowAdam(
                [model.tables[i] for i in self.trained],
                settings.m1_learning_rate,
                settings.m1_weight_decay,
                world,
            )

    def step(self, batch: Batch, step: int) -> float:
        """Update the weights by one batch a rank; return the mean loss over all their rows.

        Collective. BatchNorm normalises over a rank's own rows. A loss that is no number raises
        LcSparkError on every rank, before any update.
        """
        ids, values, labels = self.to_device(batch)
        rows = [table.detach()[ids] for table in self.model.tables]
        for i in self.trained:
            rows[i].requires_grad_()
        bfloat16 = self.settings.precision == "bfloat16"
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=bfloat16):
            logits = self.model.from_rows(rows, values)
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
        if self.row_adam is not None:
            gradients = [g.flatten(0, 1) for i in self.trained if (g := rows[i].grad) is not None]
            flat_ids = ids.flatten()
            if values is not None:
                # Padding has value 0: its features are not in the row and stand still.
                present = values.flatten().nonzero().squeeze(1)
                flat_ids, gradients = flat_ids[present], [g[present] for g in gradients]
            self.row_adam.step(flat_ids, gradients, factor)
        return mean_loss

    def _average_gradients(self, loss: Tensor) -> float:
        """Set the MLP's gradients to their mean over ranks; return the mean loss."""
        gradients = [p.grad for p in self.model.mlp.parameters() if p.grad is not None]
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
        for buffer in self.model.mlp.buffers():
            if buffer.is_floating_point():
                self.world.mean(buffer)

    def state(self) -> dict[str, Tensor]:
        """Return all that a later step depends on, by name."""
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for i, state in self.adamw.state_dict()["state"].items():
            tensors |= {f"adamw.{i}.{key}": t for key, t in state.items()}
        if self.row_adam is not None:
            tensors |= {f"rows.{name}": t for name, t in self.row_adam.state().items()}
        return tensors

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
