"""Turns shards into the LRs of a config by the torch loop; runs once in each rank."""

import contextlib
import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import lc_spark
from lc_spark.errors import LcSparkError
from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.files import as_path
from lc_spark.training import checkpoint, loader, metrics, models
from lc_spark.training.lr_network import (
    WEIGHTS_FILE,
    LrNetwork,
    Part,
    Rows,
    check_memory,
    logits,
    losses,
    write_weights,
)
from lc_spark.training.world import World, joined, progress_bar

EVALUATION_BATCH_SIZE = 8192


@dataclasses.dataclass(frozen=True)
class LrSpec:
    """What the ranks need to train LRs, in values that survive JSON."""

    folder: str  # of the run: shards, field_map.json, models
    parts: list[dict[str, Any]]  # fields of Part; the first one is the LR of all rows
    l2: list[float]
    epochs: int
    batch_size: int  # rows a rank and step
    learning_rate: float
    device: str
    seed: int

    def identity(self, ranks: int) -> dict[str, Any]:
        """Return what a checkpoint must share with this run to be of use for it."""
        manifest = as_path(self.folder) / "shards" / loader.MANIFEST_FILE
        settings = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return {
            "settings": hashlib.sha256(settings.encode()).hexdigest(),
            "data": hashlib.sha256(manifest.read_bytes()).hexdigest(),
            "version": lc_spark.__version__,
            "ranks": ranks,
        }


def run_lr_rank(spec: dict[str, Any]) -> dict[str, Any]:
    """Train LRs from an LrSpec's fields; what executors run.

    Returns l2 (the one with the lowest valid log loss), valid_losses (pairs of l2 and that), aucs,
    loss_history, iterations (epochs) and seconds_per_epoch (median); or {"error": sentence} in
    place of LcSparkError, which every rank meets alike.
    """
    with joined(spec["device"]) as world:
        try:
            return _Trainer(LrSpec(**spec), world).run()
        except LcSparkError as error:
            world.say(f"lr: {error}")
            return {"error": str(error)}


class _Trainer:
    def __init__(self, spec: LrSpec, world: World) -> None:
        self.spec, self.world = spec, world
        self.folder = as_path(spec.folder)
        self.parts = [Part(**part) for part in spec.parts]
        self.field_map = FieldMap.read(self.folder / "field_map.json")
        self.manifest = loader.read_manifest(self.folder / "shards", self.field_map)
        # A row's date comes along as one more field, which _rows takes off again.
        self.dated = any(part.before is not None for part in self.parts)
        more = (FieldInfo("date", "bucketed", 1),) if self.dated else ()
        self.read_map = FieldMap((*self.field_map.fields, *more))
        self.steps = self._steps_per_epoch()
        self.rows = self.steps * spec.batch_size * world.size
        # Rows that an epoch leaves over give no gradient, and so no penalty.
        share = self.rows / self.manifest["splits"]["train"]["rows"]
        check_memory(self.field_map.d, len(self.parts), len(spec.l2), world)
        self.network = LrNetwork(
            self.field_map.d,
            [dataclasses.replace(part, rows=round(part.rows * share)) for part in self.parts],
            spec.l2,
            spec.learning_rate,
            self.steps,
            spec.epochs,
            world,
        )
        self.seconds: list[float] = []  # by epoch
        self.losses: list[list[float]] = []  # by epoch, the mean of each LR as it was trained

    def _steps_per_epoch(self) -> int:
        groups = loader.train_row_groups(self.folder / "shards", self.manifest)
        size, batch_size = self.world.size, self.spec.batch_size
        rows = min(sum(groups[rank::size]) for rank in range(size))
        if rows < batch_size:
            raise LcSparkError(
                f"lr.batch_size is {batch_size}, but one of {size} ranks gets only {rows:,} of "
                f"{sum(groups):,} train rows: lower lr.batch_size or training.ranks."
            )
        return int(rows // batch_size)

    def run(self) -> dict[str, Any]:
        """Train, choose l2 by the valid rows, judge and save the LRs."""
        n, d, spec = len(self.parts) * len(self.spec.l2), self.field_map.d, self.spec
        self.world.say(
            f"lr: {n} LRs over {d:,} features at once, {self.steps:,} steps an epoch of "
            f"{self.world.size} ranks x {spec.batch_size:,} rows: {self.rows:,} rows seen, "
            f"{self.manifest['splits']['train']['rows'] - self.rows:,} left over"
        )
        for epoch in range(self._restore() + 1, spec.epochs + 1):
            self._epoch(epoch)
        self.network.optimiser.settle()
        valid_losses = self._valid_losses()
        l2 = min(spec.l2, key=lambda one: valid_losses[one])
        columns = self.network.columns(l2)
        weights = self.network.optimiser.weights[:, columns]
        bias = self.network.optimiser.bias[columns]
        aucs, objectives = self._judge(weights, bias, l2)
        # As MLlib's: at the start, then after each pass; but for the last as the rows were met.
        histories = [
            [start, *(of_all[column] for of_all in self.losses[:-1]), last]
            for column, start, last in zip(columns, *objectives, strict=True)
        ]
        if self.world.rank == 0:
            self._save(weights, bias, l2, histories)
            checkpoint.remove(self.folder / "lr_checkpoint")
        names = ", ".join(part.name for part in self.parts)
        self.world.say(f"lr: l2 {l2:g} of {len(spec.l2)}; made {names} in {self.folder}/models")
        return {
            "l2": l2,
            "valid_losses": list(valid_losses.items()),
            "aucs": aucs,
            "loss_history": histories[0],
            "iterations": spec.epochs,
            "seconds_per_epoch": statistics.median(self.seconds),
        }

    def _restore(self) -> int:
        """Take over the last checkpoint of the same run, if there is one; return its epoch."""
        folder, epoch = self.folder / "lr_checkpoint", 0
        if self.world.rank == 0:
            epoch = checkpoint.newest(folder, self.spec.identity(self.world.size))
        epoch = self.world.from_rank_0(epoch)
        if epoch > 0:
            tensors, progress = checkpoint.load(folder, epoch, self.world.device)
            self.network.optimiser.load_state(tensors, epoch * self.steps)
            self.losses, self.seconds = progress["losses"], progress["seconds"]
            self.world.say(f"lr: going on from the checkpoint after epoch {epoch}")
        return epoch

    def _epoch(self, epoch: int) -> None:
        batches = loader.training_batches(
            self.folder / "shards",
            self.manifest,
            self.read_map,
            self.world.rank,
            self.world.size,
            self.spec.batch_size,
            epoch,
            self.spec.seed,
        )
        n = len(self.parts) * len(self.spec.l2)
        total = torch.zeros(2, n, dtype=torch.float64, device=self.world.device)
        started = time.perf_counter()
        bar = progress_bar(self.world, f"lr epoch {epoch}", self.rows)
        with bar, contextlib.closing(batches):
            for batch in batches:
                total += self.network.step(self._rows(batch))
                bar.update(self.spec.batch_size * self.world.size)
        self.seconds.append(time.perf_counter() - started)
        loss, seen = self.world.mean(total)
        if not bool(loss.isfinite().all()):
            raise LcSparkError(f"LR's loss is no number in epoch {epoch}: lower lr.learning_rate.")
        self.losses.append((loss / seen).tolist())
        self.world.say(
            f"lr epoch {epoch}/{self.spec.epochs}: log loss of the rows as they were met, at the "
            f"best l2, {min(self.losses[-1][: len(self.spec.l2)]):.5f}; "
            f"{self.rows / self.seconds[-1]:,.0f} rows/s"
        )
        if self.world.rank == 0 and epoch < self.spec.epochs:
            checkpoint.save(
                self.folder / "lr_checkpoint",
                epoch,
                self.spec.identity(self.world.size),
                self.network.optimiser.state(),
                {"losses": self.losses, "seconds": self.seconds},
            )

    def _rows(self, batch: loader.Batch) -> Rows:
        device = self.world.device
        ids, values = batch.ids.to(device), batch.values
        values = None if values is None else values.to(device)
        dates = None
        if self.dated:
            dates = ids[:, -1] - self.field_map.d
            ids = ids[:, :-1].contiguous()
            values = None if values is None else values[:, :-1].contiguous()
        return Rows(ids, values, batch.labels.to(device), batch.folds.to(device), dates)

    def _read(self, split: str) -> Iterator[Rows]:
        """Yield this rank's rows of a split, each once."""
        shards, place = self.folder / "shards", (self.world.rank, self.world.size)
        for batch in loader.evaluation_batches(
            shards, self.manifest, self.read_map, split, *place, EVALUATION_BATCH_SIZE
        ):
            yield self._rows(batch)

    def _valid_losses(self) -> dict[float, float]:
        """Return the valid rows' log loss of the LR of all rows, by l2. Collective."""
        n = len(self.spec.l2)  # its columns come first
        weights, bias = self.network.optimiser.weights[:, :n], self.network.optimiser.bias[:n]
        weights = weights.contiguous()
        total = torch.zeros(n, dtype=torch.float64, device=self.world.device)
        for rows in self._read("valid"):
            logits_bn = logits(weights, bias, rows.ids_BC, rows.values_BC)
            total += losses(logits_bn, rows.labels_B.unsqueeze(1), torch.ones_like(logits_bn))
        total = self.world.mean(total) * self.world.size
        means = (total / self.manifest["splits"]["valid"]["rows"]).tolist()
        return dict(zip(self.spec.l2, means, strict=True))

    def _judge(
        self, weights: Tensor, bias: Tensor, l2: float
    ) -> tuple[dict[str, float], list[list[float]]]:
        """Return AUCs of an LR a part; and of each the objective on the rows it sees, at the start
        (all weights zero) and now.

        AUCs are of the first LR on train and valid, and of the held-out ones on the rows that they
        have not seen, those of all folds together ("lr_cross_fitted"). Collective; rank 0's count.
        """
        pairs: dict[str, list[Tensor]] = {"train": [], "valid": []}
        total = torch.zeros(3, len(self.parts), dtype=torch.float64, device=self.world.device)
        for split in ("train", "valid"):
            for rows in self._read(split):
                found = logits(weights, bias, rows.ids_BC, rows.values_BC)
                pairs[split].append(torch.stack([rows.labels_B, found[:, 0]], dim=1))
                if split == "valid":
                    continue
                seen, labels = self.network.seen(rows), rows.labels_B.unsqueeze(1)
                counts = [seen.double().sum(0), (seen * labels).double().sum(0)]
                total += torch.stack([losses(found, labels, seen), *counts])
                for place, part in enumerate(self.parts):
                    if part.held_out:
                        name = part.name if part.fold is None else "lr_cross_fitted"
                        new = seen[:, place] == 0
                        pair = torch.stack([rows.labels_B[new], found[new, place]], dim=1)
                        pairs.setdefault(name, []).append(pair)
        loss, rows_seen, positives = self.world.mean(total)
        rate = positives / rows_seen
        start = -torch.xlogy(rate, rate) - torch.xlogy(1 - rate, 1 - rate)
        now = loss / rows_seen + l2 / 2 * weights.square().sum(0, dtype=torch.float64)
        groups = ["train", "valid"]
        groups += ["lr_cross_fitted"] if any(p.fold is not None for p in self.parts) else []
        groups += [part.name for part in self.parts if part.before is not None]
        aucs = {}
        for name in groups:  # one after the other: each is gathered on every rank
            mine = [torch.empty(0, 2, device=self.world.device), *pairs.pop(name, [])]
            labels, scores = self.world.gather(torch.cat(mine)).cpu().numpy().T
            aucs[name] = metrics.auc(labels, scores) if self.world.rank == 0 else 0.0
        return aucs, [start.tolist(), now.tolist()]

    def _save(self, weights: Tensor, bias: Tensor, l2: float, histories: list[list[float]]) -> None:
        """Write models/<part> for each part, and the weights of the first as a table."""
        for place, part in enumerate(self.parts):
            facts = {
                "bias": float(bias[place]),
                "l2": l2,
                "loss_history": histories[place],
                "iterations": self.spec.epochs,
                "seconds": sum(self.seconds),
            }
            column = weights[:, place].cpu().numpy()
            network = models.Lr.from_weights(column, float(bias[place]))
            path = self.folder / "models" / part.name
            models.save(network, path, self.field_map.fingerprint, facts)
        first = weights[:, 0].cpu().numpy()
        write_weights(first, self.field_map, self.folder / WEIGHTS_FILE)
