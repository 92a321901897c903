"""Turns shards, a field map and LR models into a trained network; runs once in each rank.

All that a rank decides (to go on from a checkpoint, to stop early, that the loss is no number) it
decides from what every rank knows, so that none waits for another that has left.
"""

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from tqdm import tqdm

from lc_spark.errors import LcSparkError, RankError
from lc_spark.field_map import FieldMap
from lc_spark.files import as_path
from lc_spark.parameters import parameter_count
from lc_spark.systems import HELD_OUT, Training
from lc_spark.training import checkpoint, loader, metrics
from lc_spark.training.learner import Learner
from lc_spark.training.memory import check_memory
from lc_spark.training.saving import keep_model, save
from lc_spark.training.spec import TrainSpec, curves, finished, note_result, note_state
from lc_spark.training.start import at_start, go_on
from lc_spark.training.world import World, joined, progress_bar

if TYPE_CHECKING:
    from lc_spark.tracking import StageRun

LOG_EVERY_STEPS = 50
EVALUATION_BATCH_SIZE = 8192


def run_rank(specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train one network after the other, each from a TrainSpec's fields; what executors run.

    Returns the results in order, {"error": sentence} in place of LcSparkError: a task that fails
    would reach the driver before rank 0's sentence does, and would take the others with it.
    """
    results: list[dict[str, Any]] = []
    parsed = [TrainSpec(**spec) for spec in specs]
    with joined(Training.model_validate(parsed[0].training).device) as world:
        for spec in parsed:
            try:
                results.append(_Trainer(spec, world).run())
            except LcSparkError as error:  # on every rank alike: see RankError
                print(f"rank {world.rank}: {error}", flush=True)
                if world.rank == 0:
                    with contextlib.suppress(OSError):  # of a full disk the result tells
                        note_state(spec, str(error))
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
        self.shards, self.output = as_path(spec.shards), as_path(spec.output)
        self.field_map = FieldMap.read(as_path(spec.field_map))
        self.manifest = loader.read_manifest(self.shards, self.field_map)
        self._check_valid_split()
        groups = loader.train_row_groups(self.shards, self.manifest, spec.first_date)
        self.steps = loader.steps_per_epoch(groups, world.size, self.settings.batch_size)
        self.rows = self.steps * self.settings.batch_size * world.size
        self.left_over = sum(groups) - self.rows
        self.count = parameter_count(
            spec.system,
            self.field_map.d,
            len(self.field_map.fields),
            self.settings.hidden,
            self.settings.channels,
            self.settings.batch_norm,
        )
        # M1 is trained with the rest from the epoch after this one on.
        self.held_epochs = self.settings.epochs
        if self.settings.start in HELD_OUT and self.settings.m1 == "frozen":
            self.held_epochs -= self.settings.joint_epochs
        self.history: list[dict[str, Any]] = []
        self.stage_run = self._stage_run()

    def _check_valid_split(self) -> None:
        valid = self.manifest["splits"]["valid"]
        if not 0 < valid["positives"] < valid["rows"]:
            raise LcSparkError(
                f"The valid split has {valid['rows']} rows, {valid['positives']} of them positive: "
                "AUC needs both labels there. Give it more rows (split.valid or the split's dates)."
            )

    def _learner(self) -> Learner:
        """Return the network at its start, with its optimisers."""
        folds = len(self.spec.held_out_lr)
        check_memory(self.spec.system, self.count, self.field_map, self.settings, folds, self.world)
        torch.manual_seed(self.spec.seed)  # the same start on every rank
        model, copies = at_start(self.spec, self.settings, self.field_map)
        steps = self.steps * self.settings.epochs
        learner = Learner(model, self.settings, steps, self.world, copies)
        go_on(self.spec, learner, self.field_map)
        return learner

    def _stage_run(self) -> "StageRun | None":
        if self.world.rank != 0 or self.spec.tracking_uri is None or self.spec.run_id is None:
            return None
        from lc_spark.tracking import append_to

        return append_to(self.spec.tracking_uri, self.spec.run_id)

    def run(self) -> dict[str, Any]:
        """Train to the last epoch or the early stop, unless that was done; return the result."""
        done = finished(self.spec)
        if self.world.from_rank_0(int(done is not None)):
            self.world.say(f"{self.spec.name}: trained before with the same settings and data")
            done = done or {"epochs": []}  # a rank that cannot see the file: rank 0's counts
            for entry in done["epochs"]:
                self._log(entry)
            return done
        self.world.say(
            f"{self.spec.name}: {self.steps:,} steps an epoch of {self.world.size} ranks x "
            f"{self.settings.batch_size:,} rows: {self.rows:,} rows seen, "
            f"{self.left_over:,} left over"
        )
        save(self.world, lambda: note_state(self.spec))
        self.learner = self._learner()
        first = self._restore() + 1
        for epoch in range(first, self.settings.epochs + 1):
            if not self._stopped_early(epoch):
                self._epoch(epoch)
        result = self._result()
        save(self.world, lambda: note_result(self.spec, result))
        if self.world.rank == 0:
            checkpoint.remove(self.output / "checkpoint")
        return result

    def _result(self) -> dict[str, Any]:
        best = self._best()
        return {
            "epochs": self.history,
            "best_epoch": best["epoch"],
            "best_valid_auc": best["valid_auc"],
            "best_valid_logloss": best["valid_logloss"],
            "seconds_per_epoch": self.rows
            * statistics.median(e["seconds"] / e["rows"] for e in self.history),
            "rows_per_epoch": self.rows,
            "rows_left_over": self.left_over,
            "steps_per_epoch": self.steps,
            "parameters": self.count.total,
        }

    def _epoch(self, epoch: int) -> None:
        """Take every step of an epoch, with a look at the valid split every so often."""
        if epoch > self.held_epochs:
            self.learner.end_copies()
        # By epoch, so that a run that goes on from a checkpoint draws what it would have drawn.
        torch.manual_seed((self.spec.seed * 1_000_003 + epoch * 1_009 + self.world.rank) % 2**63)
        looks = self.settings.evaluations
        ends = [self.steps * look // looks for look in range(1, looks + 1)]
        batches = loader.training_batches(
            self.shards,
            self.manifest,
            self.field_map,
            self.world.rank,
            self.world.size,
            self.settings.batch_size,
            epoch,
            self.spec.seed,
            self.spec.first_date,
        )
        bar = progress_bar(self.world, f"{self.spec.name} epoch {epoch}", self.rows)
        with bar, contextlib.closing(batches):
            for look, (begin, end) in enumerate(itertools.pairwise([0, *ends]), start=1):
                if begin == end or self._stopped_early(epoch):
                    continue
                started = time.perf_counter()
                losses = self._steps(itertools.islice(batches, end - begin), epoch, begin, bar)
                seconds = time.perf_counter() - started
                self._look(epoch - 1 + look / looks, losses, seconds)
        save(self.world, lambda: self._save_checkpoint(epoch))

    def _save_checkpoint(self, epoch: int) -> None:
        identity = {**self.spec.identity(), "ranks": self.world.size}
        state, progress = self.learner.state(), {"epochs": self.history}
        checkpoint.save(self.output / "checkpoint", epoch, identity, state, progress)

    def _steps(
        self, batches: Iterable[loader.Batch], epoch: int, begin: int, bar: "tqdm[NoReturn]"
    ) -> list[float]:
        """Take a step a batch, the first of them step `begin` of the epoch; return the losses."""
        self.learner.model.train()
        losses = []
        for step, batch in enumerate(batches, start=(epoch - 1) * self.steps + begin):
            losses.append(self.learner.step(batch, step))
            if self.stage_run is not None and step % LOG_EVERY_STEPS == 0:
                self._log_metrics({"train_loss": losses[-1]}, step)
            bar.update(self.settings.batch_size * self.world.size)
        return losses

    def _look(self, epoch: float, losses: list[float], seconds: float) -> None:
        """Note the quality after so many epochs; keep the model if it is the best so far."""
        self.learner.settle()
        entry = {
            "epoch": epoch,
            "train_loss": math.fsum(losses) / len(losses),
            "seconds": round(seconds, 3),
            "rows": len(losses) * self.settings.batch_size * self.world.size,
        }
        for split in ("valid", *self.spec.watch):
            entry[f"{split}_auc"], entry[f"{split}_logloss"] = self._quality(split)
        self.history.append(entry)
        self._log(entry)
        self.world.say(
            f"{self.spec.name} epoch {epoch:.3g}/{self.settings.epochs}: train loss "
            f"{entry['train_loss']:.4f}, valid AUC {entry['valid_auc']:.4f}, valid log loss "
            f"{entry['valid_logloss']:.4f}, {entry['rows'] / seconds:,.0f} rows/s"
        )
        if self._best() is entry:
            fingerprint = self.field_map.fingerprint
            save(self.world, lambda: keep_model(self.spec, self.learner, fingerprint, entry))

    def _log(self, entry: dict[str, Any]) -> None:
        """Log the numbers after a part of an epoch; the step counts those parts."""
        if self.stage_run is not None:
            self._log_metrics(*curves(entry, self.settings.evaluations))

    def _log_metrics(self, numbers: dict[str, float], step: int) -> None:
        assert self.stage_run is not None, "rank 0 has a run to log to"
        try:
            self.stage_run.log_metrics(numbers, step=step)
        except LcSparkError as error:  # the other ranks know nothing of it
            raise RankError(str(error)) from error

    def _best(self) -> dict[str, Any]:
        return max(self.history, key=lambda e: (e["valid_auc"], -e["epoch"]))

    def _stopped_early(self, epoch: int) -> bool:
        """Return whether to pass over an epoch; the joint ones at the end are never passed over."""
        if not self.history or epoch > self.held_epochs:
            return False
        return bool(self.history[-1]["epoch"] - self._best()["epoch"] >= self.settings.patience)

    def _quality(self, split: str) -> tuple[float, float]:
        """Return AUC and log loss of a whole split, in float32, as scoring will be."""
        self.learner.model.eval()
        parts = [torch.empty(0, 2, device=self.world.device)]
        batches = loader.evaluation_batches(
            self.shards,
            self.manifest,
            self.field_map,
            split,
            self.world.rank,
            self.world.size,
            EVALUATION_BATCH_SIZE,
        )
        for batch in batches:
            labels_and_logits = [batch.labels.to(self.world.device), self.learner.logits(batch)]
            parts.append(torch.stack(labels_and_logits, dim=1))
        labels, logits = self.world.gather(torch.cat(parts)).cpu().numpy().T
        return metrics.auc(labels, logits), metrics.log_loss(labels, logits)

    def _restore(self) -> int:
        """Take over the last checkpoint of the same run, if there is one; return its epoch."""
        folder, epoch = self.output / "checkpoint", 0
        if self.world.rank == 0:
            identity = {**self.spec.identity(), "ranks": self.world.size}
            epoch = checkpoint.newest(folder, identity)
        epoch = self.world.from_rank_0(epoch)
        if epoch > 0:
            if epoch > self.held_epochs:
                self.learner.end_copies()
            tensors, progress = checkpoint.load(folder, epoch, self.world.device)
            self.learner.load_state(tensors)
            self.history = progress["epochs"]
            self.world.say(f"{self.spec.name}: going on from the checkpoint after epoch {epoch}")
        return epoch
