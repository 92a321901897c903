"""Turns shards, a field map and an LR model into a trained LC network; runs once in each rank.

All that a rank decides (to go on from a checkpoint, to stop early, that the loss is no number) it
decides from what every rank knows, so that none waits for another that has left.
"""

import hashlib
import math
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tqdm import tqdm

from lc_spark.errors import LcSparkError
from lc_spark.field_map import FieldMap, require_same
from lc_spark.systems import Training
from lc_spark.training import checkpoint, loader, metrics, models
from lc_spark.training.learner import Learner
from lc_spark.training.world import LineStream, World, joined

if TYPE_CHECKING:
    from lc_spark.tracking import StageRun

LOG_EVERY_STEPS = 50
PROGRESS_SECONDS = 5.0
EVALUATION_BATCH_SIZE = 8192


@dataclass(frozen=True)
class TrainSpec:
    """What one training run needs, in values that survive JSON."""

    name: str  # of the system, as shown
    system: Literal["lc_dnn", "lc_wd"]
    training: dict[str, Any]  # config.Training
    shards: str  # folder
    field_map: str  # file
    lr_model: str | None  # folder; None only with start: random
    output: str  # folder of the trained model
    seed: int
    digest: str  # of the whole config: a checkpoint of another one is not gone on from
    tracking_uri: str | None = None
    run_id: str | None = None


def run_rank(specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train one network after the other, each from a TrainSpec's fields; what executors run.

    Returns the results in order, up to the first {"error": sentence} in place of LcSparkError: a
    task that fails would reach the driver before rank 0's sentence does.
    """
    results: list[dict[str, Any]] = []
    try:
        parsed = [TrainSpec(**spec) for spec in specs]
        with joined(Training.model_validate(parsed[0].training).device) as world:
            for spec in parsed:
                results.append(_Trainer(spec, world).run())
    except LcSparkError as error:
        print(f"rank {os.environ.get('RANK', '0')}: {error}", flush=True)
        results.append({"error": str(error)})
    return results


def train(spec: TrainSpec) -> dict[str, Any]:
    """Train one network and keep its best epoch in spec.output; every rank calls it.

    Ranks are told by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT (torchrun's names); without them
    it is one. Goes on from the checkpoint in spec.output, when there is one of the same run.

    Returns epochs (list of epoch, train_loss, valid_auc, valid_logloss, seconds, rows), best_epoch,
    best_valid_auc, best_valid_logloss, seconds_per_epoch (median, training alone), rows_per_epoch,
    rows_left_over, steps_per_epoch, parameters. Raises LcSparkError on inputs that do not fit each
    other and on a loss that is no number.
    """
    with joined(Training.model_validate(spec.training).device) as world:
        return _Trainer(spec, world).run()


class _Trainer:
    def __init__(self, spec: TrainSpec, world: World) -> None:
        self.spec, self.world = spec, world
        self.settings = Training.model_validate(spec.training)
        self.shards, self.output = Path(spec.shards), Path(spec.output)
        self.field_map = FieldMap.read(Path(spec.field_map))
        self.manifest = loader.read_manifest(self.shards, self.field_map)
        self._check_valid_split()
        self.steps = loader.steps_per_epoch(self.manifest, world.size, self.settings.batch_size)
        torch.manual_seed(spec.seed)  # the same start on every rank
        model = models.build(spec.system, self.field_map, self.settings)
        assert isinstance(model, models.LcNetwork)
        self.model = model
        self._start()
        total_steps = self.steps * self.settings.epochs
        self.learner = Learner(model, self.settings, total_steps, world)
        self.history: list[dict[str, Any]] = []
        self.stage_run = self._stage_run()

    def _check_valid_split(self) -> None:
        valid = self.manifest["splits"]["valid"]
        if not 0 < valid["positives"] < valid["rows"]:
            raise LcSparkError(
                f"The valid split has {valid['rows']} rows, {valid['positives']} of them positive: "
                "AUC needs both labels there. Give it more rows (split.valid or the split's dates)."
            )

    def _start(self) -> None:
        if self.settings.start == "random":
            return
        if self.spec.lr_model is None:
            raise LcSparkError(
                f"training.start is {self.settings.start}, but there is no LR model: run the "
                "train_lr stage first, or set it to random."
            )
        folder = Path(self.spec.lr_model)
        lr_model, description = models.load(folder)
        require_same(self.field_map.fingerprint, description["fingerprint"], f"The LR in {folder}")
        assert isinstance(lr_model, models.Lr)
        models.start_from_lr(self.model, lr_model.weight, self.settings.start)

    def _stage_run(self) -> "StageRun | None":
        if self.world.rank != 0 or self.spec.tracking_uri is None or self.spec.run_id is None:
            return None
        from lc_spark.tracking import append_to

        return append_to(self.spec.tracking_uri, self.spec.run_id)

    def run(self) -> dict[str, Any]:
        """Train to the last epoch or the early stop; return the result."""
        rows = self.steps * self.settings.batch_size * self.world.size
        left_over = self.manifest["splits"]["train"]["rows"] - rows
        self.world.say(
            f"{self.spec.name}: {self.steps:,} steps an epoch of {self.world.size} ranks x "
            f"{self.settings.batch_size:,} rows: {rows:,} rows seen, {left_over:,} left over"
        )
        self._restore()
        while len(self.history) < self.settings.epochs and not self._stopped_early():
            self._run_epoch(len(self.history) + 1, rows)
        best = self._best()
        if self.world.rank == 0:
            checkpoint.remove(self.output / "checkpoint")
        return {
            "epochs": self.history,
            "best_epoch": best["epoch"],
            "best_valid_auc": best["valid_auc"],
            "best_valid_logloss": best["valid_logloss"],
            "seconds_per_epoch": statistics.median(e["seconds"] for e in self.history),
            "rows_per_epoch": rows,
            "rows_left_over": left_over,
            "steps_per_epoch": self.steps,
            "parameters": models.parameter_count(
                self.spec.system,
                self.field_map.d,
                len(self.field_map.fields),
                self.settings.hidden,
                self.settings.channels,
            ),
        }

    def _run_epoch(self, epoch: int, rows: int) -> None:
        started = time.perf_counter()
        train_loss = self._epoch(epoch)
        seconds = time.perf_counter() - started
        valid_auc, valid_logloss = self._validate()
        entry = {
            "epoch": epoch,
            "train_loss": train_loss,
            "valid_auc": valid_auc,
            "valid_logloss": valid_logloss,
            "seconds": round(seconds, 3),
            "rows": rows,
        }
        self.history.append(entry)
        self.world.say(
            f"{self.spec.name} epoch {epoch}/{self.settings.epochs}: train loss {train_loss:.4f}, "
            f"valid AUC {valid_auc:.4f}, valid log loss {valid_logloss:.4f}, "
            f"{rows / seconds:,.0f} rows/s"
        )
        if self.stage_run is not None:
            curves = {"epoch_train_loss": train_loss, "seconds": seconds}
            curves |= {"valid_auc": valid_auc, "valid_logloss": valid_logloss}
            self.stage_run.log_metrics(curves, step=epoch)
        if self.world.rank == 0:
            if self._best() is entry:
                description = {"name": self.spec.name, "best": entry}
                models.save(self.model, self.output, self.field_map.fingerprint, description)
            self._save_checkpoint(epoch)

    def _best(self) -> dict[str, Any]:
        return max(self.history, key=lambda e: (e["valid_auc"], -e["epoch"]))

    def _stopped_early(self) -> bool:
        if not self.history:
            return False
        return len(self.history) - int(self._best()["epoch"]) >= self.settings.patience

    def _epoch(self, epoch: int) -> float:
        """Take every step of an epoch; return the mean loss over its rows."""
        # By epoch, so that a run that goes on from a checkpoint draws what it would have drawn.
        torch.manual_seed((self.spec.seed * 1_000_003 + epoch * 1_009 + self.world.rank) % 2**63)
        self.model.train()
        rows = self.settings.batch_size * self.world.size
        losses = []
        batches = loader.training_batches(
            self.shards,
            self.manifest,
            self.field_map,
            self.world.rank,
            self.world.size,
            self.settings.batch_size,
            epoch,
            self.spec.seed,
        )
        with tqdm(
            desc=f"{self.spec.name} epoch {epoch}",
            total=self.steps * rows,
            unit=" rows",
            unit_scale=True,
            mininterval=PROGRESS_SECONDS,
            ascii=True,
            disable=self.world.rank != 0,
            file=LineStream(),
        ) as bar:
            for at, batch in enumerate(batches):
                step = (epoch - 1) * self.steps + at
                losses.append(self.learner.step(batch, step))
                if self.stage_run is not None and step % LOG_EVERY_STEPS == 0:
                    self.stage_run.log_metrics({"train_loss": losses[-1]}, step=step)
                bar.update(rows)
        self.learner.average_statistics()
        return math.fsum(losses) / len(losses)

    def _validate(self) -> tuple[float, float]:
        """Return AUC and log loss of the whole valid split, in float32, as scoring will be."""
        self.model.eval()
        parts = [torch.empty(0, 2, device=self.world.device)]
        batches = loader.evaluation_batches(
            self.shards,
            self.manifest,
            self.field_map,
            "valid",
            self.world.rank,
            self.world.size,
            EVALUATION_BATCH_SIZE,
        )
        for batch in batches:
            labels_and_logits = [batch.labels.to(self.world.device), self.learner.logits(batch)]
            parts.append(torch.stack(labels_and_logits, dim=1))
        labels, logits = self.world.gather(torch.cat(parts)).cpu().numpy().T
        return metrics.auc(labels, logits), metrics.log_loss(labels, logits)

    def _identity(self) -> dict[str, Any]:
        """Return what a checkpoint must share with this run to be gone on from."""
        data = (self.shards / loader.MANIFEST_FILE).read_bytes()
        if self.spec.lr_model is not None and self.settings.start != "random":
            data += (Path(self.spec.lr_model) / models.MODEL_FILE).read_bytes()
        return {
            "config": self.spec.digest,
            "fingerprint": self.field_map.fingerprint,
            "data": hashlib.sha256(data).hexdigest()[:16],
            "ranks": self.world.size,
        }

    def _save_checkpoint(self, epoch: int) -> None:
        progress = {"epochs": self.history}
        state = self.learner.state()
        checkpoint.save(self.output / "checkpoint", epoch, self._identity(), state, progress)

    def _restore(self) -> None:
        """Take over the last checkpoint of the same run, if there is one."""
        folder, epoch = self.output / "checkpoint", 0
        if self.world.rank == 0:
            epoch = checkpoint.newest(folder, self._identity())
        epoch = self.world.from_rank_0(epoch)
        if epoch > 0:
            tensors, progress = checkpoint.load(folder, epoch, self.world.device)
            self.learner.load_state(tensors)
            self.history = progress["epochs"]
            self.world.say(f"{self.spec.name}: going on from the checkpoint after epoch {epoch}")
