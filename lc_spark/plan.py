"""Turns what a trial counted and timed into the memory, disk and seconds that a run will take.

Memory is of one machine that runs all: a local master. JVM heaps are taken at what
spark.driver_memory lets them grow to.
"""

import itertools
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from lc_spark.config import Config
from lc_spark.features.counts import HELD_COUNTS
from lc_spark.features.memory import COLLECTING, TEXTS
from lc_spark.features.vectors import MAX_FEATURES
from lc_spark.field_map import FieldMap
from lc_spark.parameters import ParameterCount, copies_bytes, parameter_count
from lc_spark.systems import System
from lc_spark.training import lr, lr_choice
from lc_spark.training.lr_network import lr_bytes
from lc_spark.training.step_time import StepTime, lr_step_time, rank_start, step_time
from lc_spark.trial import Trial

log = logging.getLogger("lc_spark")

GB = 1e9
# Bytes of a driver or worker in Python, and of a JVM beside its heap, before they hold any data.
PYTHON_BYTES = 250_000_000
JVM_BYTES = 600_000_000
DOUBLE, FLOAT = 8, 4
HEAP_SHARE = 0.6  # of the JVM's heap that data may take: spark.memory.fraction
ROW_COPIES = 2  # as vectors, and in the blocks that MLlib makes of them
ROW_BYTES, ENTRY_BYTES = 100, 12  # of a sparse vector, and of an index and value in it
COUNT_BYTES = 64  # of a value that a worker counts: text, hash and count, and as it sends them
VOCABULARY_BYTES = 12  # an entry: int64 hash, int32 index
TEXT_BYTES = 16  # of a value, about
CHECKPOINT = 3  # copies of the weights in a file: themselves and two moments


@dataclass(frozen=True)
class Machine:
    """What there is, and what a rank takes of it with nothing to train."""

    cores: int
    memory: int  # bytes
    disk: int | None  # bytes free for the workspace; None behind a URI
    rank_seconds: float  # to start
    rank_bytes: int


@dataclass(frozen=True)
class Plan:
    """All that is known of a run before it: config, trial and times of steps."""

    config: Config
    field_map: FieldMap
    trial: Trial
    steps: Mapping[str, StepTime]
    lr_step: StepTime | None  # where torch fits LR
    machine: Machine

    def parameters(self, system: System) -> ParameterCount:
        """Return the parameters of a system."""
        training = self.config.training_of(system)
        f = len(self.field_map.fields)
        sizes = training.hidden, training.channels, training.batch_norm
        return parameter_count(system.system, self.field_map.d, f, *sizes)

    def rank_bytes(self, system: System) -> int:
        """Return what a rank holds of weights, moments and copies of M1: as check_memory has it."""
        training = self.config.training_of(system)
        folds = {"lr_cross_fitted": self.config.shards.folds, "lr_past": 1}.get(training.start, 0)
        copies = copies_bytes(folds, self.field_map.d, training.m1)
        return self.parameters(system).training_bytes + copies

    @property
    def networks(self) -> list[System]:
        """The systems that ranks train."""
        return [system for system in self.config.systems if system.system != "lr"]

    @property
    def heap(self) -> int:
        """What spark.driver_memory lets the JVM's heap grow to."""
        text = self.config.spark.driver_memory
        return int(text[:-1]) * (2**30 if text[-1] == "g" else 2**20)

    @property
    def lr_by(self) -> str:
        """What fits LR, "mllib" or "torch"."""
        if self.config.lr.by != "auto":
            return self.config.lr.by
        return "torch" if self.trial.mllib is None else "mllib"

    @property
    def lr_heap(self) -> int:
        """The heap that MLlib needs for its dense vectors; rows that do not fit go to disk."""
        return lr_choice.mllib_bytes(self.field_map.d, self.machine.cores)

    @property
    def lr_rows(self) -> int:
        """The memory that the train rows of LR take where they all are kept in it."""
        columns = sum(info.max_values for info in self.field_map.fields)
        row = ROW_BYTES + ENTRY_BYTES * columns
        return ROW_COPIES * row * self.trial.split_rows["train"]

    def memory(self) -> dict[str, dict[str, int]]:
        """Return bytes by stage and by who holds them."""
        entries = sum(info.size for info in self.field_map.fields if info.has_vocabulary)
        cores, jvm = self.machine.cores, self.heap + JVM_BYTES
        cells = len(self.field_map.fields) * self.trial.split_rows["train"] // cores
        worker = PYTHON_BYTES + COUNT_BYTES * min(HELD_COUNTS, cells)
        worker += 2 * VOCABULARY_BYTES * entries  # as it came and as it is used
        driver = PYTHON_BYTES + (COLLECTING + TEXTS * TEXT_BYTES) * entries
        ranks = [
            self.config.training_of(s).ranks * (self.machine.rank_bytes + self.rank_bytes(s))
            for s in self.networks
        ]
        models = [4 * self.parameters(system).total for system in self.config.systems]
        scorer = self.machine.rank_bytes + max(models)
        python = {"driver": driver, "JVM": jvm}
        lr_rank = self.machine.rank_bytes + lr_bytes(
            self.field_map.d, 1 + len(self.held_out), len(self.config.lr.l2)
        )
        lr_ranks = self.config.training.ranks * lr_rank if self.lr_by == "torch" else 0
        return {
            "ingest": {"driver": PYTHON_BYTES, "JVM": jvm},
            "features": {**python, "workers": cores * worker},
            "train_lr": {**python, "ranks": lr_ranks},
            "train_lc": {**python, "ranks": max(ranks, default=0)},
            "evaluate": {**python, "workers": cores * scorer},
        }

    def disk(self) -> dict[str, int]:
        """Return bytes on disk by stage; what train_lr and train_lc remove at their end too."""
        rows, d = self.trial.split_rows, self.field_map.d
        a_row = self.trial.bytes_a_row
        n = sum(rows.values())
        fits = 1 + len(self.held_out)
        if self.lr_by == "torch":  # the LRs, a checkpoint of all that they are chosen from, a table
            checkpoint = lr_bytes(d, fits, len(self.config.lr.l2))
            of_lr = fits * d * FLOAT + checkpoint + 2 * DOUBLE * d
        else:
            assert self.trial.mllib is not None, "it was timed"
            vectors = self.trial.mllib.vector_bytes * (rows["train"] + rows["valid"])
            of_lr = int(vectors + fits * d * DOUBLE)
        weights = [4 * self.parameters(system).total for system in self.networks]
        saved = CHECKPOINT * max(weights, default=0)
        return {
            "ingest": int(a_row["raw"] * n),
            "features": int(a_row["shards"] * n + VOCABULARY_BYTES * d),
            "train_lr": of_lr,
            "train_lc": sum(weights) + saved,
        }

    @property
    def held_out(self) -> list[float]:
        """The share of the train rows that each LR beside the first one is fitted on."""
        folds = self.config.shards.folds
        shares = {
            "lr_cross_fitted": [1 - 1 / folds] * folds,
            "lr_past": [1.0],  # less the days that it names
        }
        starts = {(t.start, t.days) for t in map(self.config.training_of, self.networks)}
        return [share for start, _ in sorted(starts, key=str) for share in shares.get(start, [])]

    def seconds(self) -> dict[str, float]:
        """Return seconds by stage; of LR those of all passes that it may take."""
        trial, rows = self.trial, self.trial.split_rows
        n = sum(rows.values())
        alike = itertools.groupby(
            (self.config.training_of(system) for system in self.networks),
            key=lambda training: (training.ranks, training.device),
        )
        starts = sum(self.machine.rank_seconds for _ in alike)
        scored = sum(self.scoring(s, rows["valid"] + rows["test"]) for s in self.networks)
        return {
            "ingest": 2 * trial.count_seconds + trial.read_seconds + trial.write.at(n),
            "features": trial.features.at(n),
            "train_lr": self._lr_seconds(),
            "train_lc": starts + sum(map(self.training_seconds, self.networks)),
            "evaluate": trial.features.fixed + scored,
        }

    def _lr_seconds(self) -> float:
        mllib, rows, settings = self.trial.mllib, self.trial.split_rows, self.config.lr
        if mllib is None:
            assert self.lr_step is not None, "one of the two was timed"
            at_once = self.config.training.ranks * settings.batch_size
            steps = settings.epochs * rows["train"] / at_once
            # The valid rows choose the l2, and both splits are judged in the end.
            looks = (rows["train"] + 2 * rows["valid"]) / at_once
            training, scoring = self.lr_step.training, self.lr_step.scoring
            return self.machine.rank_seconds + steps * training + looks * scoring
        fitted = [1.0] * len(settings.l2) + self.held_out
        passes = settings.max_iterations + 1
        fits = sum(passes * mllib.lr_pass.at(share * rows["train"]) for share in fitted)
        return mllib.vectors.at(rows["train"] + rows["valid"]) + fits

    def training_seconds(self, system: System) -> float:
        """Return the seconds of all epochs of a system, with the looks at the valid split."""
        training = self.config.training_of(system)
        rows = self.trial.split_rows
        steps = rows["train"] // (training.ranks * training.batch_size)
        look = self.scoring(system, rows["valid"])
        epoch = steps * self.steps[system.name].training + training.evaluations * look
        return training.epochs * epoch

    def scoring(self, system: System, n_rows: int) -> float:
        """Return the seconds in which the ranks score so many rows."""
        training = self.config.training_of(system)
        return n_rows / (training.ranks * training.batch_size) * self.steps[system.name].scoring

    def problem(self) -> str:
        """Return why the run cannot fit this machine; empty when it does."""
        d = self.field_map.d
        by_mllib = self.lr_by == "mllib"
        if by_mllib and d > MAX_FEATURES:
            return f"MLlib's vectors hold {MAX_FEATURES:,} features, there will be {d:,}"
        if by_mllib and self.lr_heap > self.heap:
            return (
                f"train_lr needs a heap of {self.lr_heap / GB:,.1f} GB for its vectors over {d:,} "
                f"features, spark.driver_memory is {self.config.spark.driver_memory}"
            )
        for stage, parts in self.memory().items():
            total = sum(parts.values())
            if total > self.machine.memory:
                held = " + ".join(f"{who} {n / GB:,.1f}" for who, n in parts.items() if n)
                return (
                    f"{stage} needs {total / GB:,.1f} GB of memory ({held}), this machine has "
                    f"{self.machine.memory / GB:,.1f} GB"
                )
        disk = sum(self.disk().values())
        if self.machine.disk is not None and disk > self.machine.disk:
            return (
                f"the workspace needs {disk / GB:,.1f} GB of disk, {self.machine.disk / GB:,.1f} "
                "GB are free"
            )
        return ""


def of_trial(config: Config, trial: Trial, cores: int) -> Plan:
    """Return the plan for this machine, after timing steps on it."""
    field_map = trial.fields.field_map
    started = time.perf_counter()
    steps = {
        system.name: step_time(system.system, config.training_of(system), field_map, cores)
        for system in config.systems
        if system.system != "lr"
    }
    lr_step = None
    if trial.mllib is None:
        parts = 1 + len(lr.held_out_names(config))
        lr_step = lr_step_time(config.lr, config.training, parts, field_map, cores)
    log.info("plan: training steps timed (%.0f s)", time.perf_counter() - started)
    workspace = config.workspace_path
    disk = None
    if isinstance(workspace, Path):
        there = next(path for path in (workspace, *workspace.parents) if path.is_dir())
        disk = psutil.disk_usage(str(there)).free
    memory = psutil.virtual_memory().total
    machine = Machine(cores, memory, disk, *rank_start())
    return Plan(config, field_map, trial, steps, lr_step, machine)
