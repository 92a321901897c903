"""Turns what a trial counted and timed into the memory, disk and seconds that a run will take.

Memory is of one machine that runs all: a local master. JVM heaps are taken at what
spark.driver_memory lets them grow to.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from lc_spark.config import Config
from lc_spark.features.memory import COLLECTING, TEXTS
from lc_spark.features.vectors import MAX_FEATURES
from lc_spark.features.vocabulary import CHUNK_CELLS
from lc_spark.field_map import FieldMap
from lc_spark.parameters import ParameterCount, copies_bytes, parameter_count
from lc_spark.systems import System
from lc_spark.training.step_time import StepTime, rank_start, step_time
from lc_spark.trial import Trial

GB = 1e9
# Bytes of a driver or worker in Python, and of a JVM beside its heap, before they hold any data.
PYTHON_BYTES = 250_000_000
JVM_BYTES = 600_000_000
# L-BFGS holds 10 pairs of vectors over d, the point, its gradient, the next of both, a direction;
# each task a gradient and its copy on the way to the driver, and the weights that it was sent.
LBFGS_VECTORS = 26
TASK_VECTORS = 3
DOUBLE = 8
HEAP_SHARE = 0.6  # of the JVM's heap that data may take: spark.memory.fraction
ROW_COPIES = 2  # as vectors, and in the blocks that MLlib makes of them
ROW_BYTES, ENTRY_BYTES = 100, 12  # of a sparse vector, and of an index and value in it
CELL_BYTES = 16  # of a value that a worker counts, as text
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
    """All that is known of a run before it: config, trial and step times by system."""

    config: Config
    field_map: FieldMap
    trial: Trial
    steps: Mapping[str, StepTime]
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
    def lr_heap(self) -> int:
        """The heap that LR needs for its dense vectors; rows that do not fit go to disk."""
        vectors = LBFGS_VECTORS + TASK_VECTORS * self.machine.cores
        return int(self.field_map.d * DOUBLE * vectors / HEAP_SHARE)

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
        worker = PYTHON_BYTES + CELL_BYTES * min(CHUNK_CELLS, cells)
        worker += 2 * VOCABULARY_BYTES * entries  # as it came and as it is used
        driver = PYTHON_BYTES + (COLLECTING + TEXTS * TEXT_BYTES) * entries
        ranks = [
            self.config.training_of(s).ranks * (self.machine.rank_bytes + self.rank_bytes(s))
            for s in self.networks
        ]
        models = [4 * self.parameters(system).total for system in self.config.systems]
        scorer = self.machine.rank_bytes + max(models)
        python = {"driver": driver, "JVM": jvm}
        return {
            "ingest": {"driver": PYTHON_BYTES, "JVM": jvm},
            "features": {**python, "workers": cores * worker},
            "train_lr": {**python, "workers": 0},
            "train_lc": {**python, "ranks": max(ranks, default=0)},
            "evaluate": {**python, "workers": cores * scorer},
        }

    def disk(self) -> dict[str, int]:
        """Return bytes on disk by stage; what train_lr and train_lc remove at their end too."""
        rows, d = self.trial.split_rows, self.field_map.d
        a_row = self.trial.bytes_a_row
        n = sum(rows.values())
        fits = 1 + len(self.held_out)
        weights = [4 * self.parameters(system).total for system in self.networks]
        checkpoint = CHECKPOINT * max(weights, default=0)
        return {
            "ingest": int(a_row["raw"] * n),
            "features": int(a_row["shards"] * n + VOCABULARY_BYTES * d),
            "train_lr": int(a_row["vectors"] * (rows["train"] + rows["valid"]) + fits * d * DOUBLE),
            "train_lc": sum(weights) + checkpoint,
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
        fitted = [1.0] * len(self.config.lr.l2) + self.held_out
        passes = self.config.lr.max_iterations + 1
        lr = sum(passes * trial.lr_pass.at(share * rows["train"]) for share in fitted)
        alike = itertools.groupby(
            (self.config.training_of(system) for system in self.networks),
            key=lambda training: (training.ranks, training.device),
        )
        starts = sum(self.machine.rank_seconds for _ in alike)
        scored = sum(self.scoring(s, rows["valid"] + rows["test"]) for s in self.networks)
        return {
            "ingest": 2 * trial.count_seconds + trial.read_seconds + trial.write.at(n),
            "features": trial.features.at(n),
            "train_lr": trial.vectors.at(rows["train"] + rows["valid"]) + lr,
            "train_lc": starts + sum(map(self.training_seconds, self.networks)),
            "evaluate": trial.features.fixed + scored,
        }

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
        if d > MAX_FEATURES:
            return f"MLlib's vectors hold {MAX_FEATURES:,} features, there will be {d:,}"
        if self.lr_heap > self.heap:
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

    def advice(self) -> str:
        """Return the first change with which the run fits, as an order; empty where it fits."""
        if not self.problem():
            return ""
        for words, changed in self._changes():
            if not changed.problem():
                return words
        return (
            "Take a larger machine or a cluster, fewer rows (source.path, split), or a larger disk "
            "(workspace): no single setting is enough."
        )

    def _changes(self) -> Iterator[tuple[str, "Plan"]]:
        """Yield changes from the mildest on, the last with a heap of what LR needs as well."""
        heap = max(2, math.ceil(1.1 * self.lr_heap / 2**30))
        roomy = self._with({"spark": {"driver_memory": f"{heap}g"}})
        words = f"Set spark.driver_memory to {heap}g"
        yield f"{words}.", roomy
        for plan, first in ((self, ""), (roomy, f"{words} and ")):
            yield from plan._smaller(first)

    def _smaller(self, first: str) -> Iterator[tuple[str, "Plan"]]:
        def said(text: str) -> str:
            return f"{first}{text}" if first else text[0].upper() + text[1:]

        ranks = self.config.most_ranks
        for fewer in range(ranks - 1, 0, -1):
            systems = [s.model_dump() for s in self.config.systems]
            for system in systems:
                system["training"].pop("ranks", None)
            changed = self._with({"training": {"ranks": fewer}}, systems)
            yield said(f"lower training.ranks to {fewer} (now {ranks})."), changed
        by_size = sorted(self.networks, key=self.rank_bytes, reverse=True)
        for n in range(1, len(by_size) + 1):
            out = {system.name for system in by_size[:n]}
            left = [s.model_dump() for s in self.config.systems if s.name not in out]
            if left:
                names = ", ".join(f"'{name}'" for name in sorted(out))
                yield said(f"take {names} out of systems."), self._with({}, left)
        largest = max(self.field_map.fields, key=lambda info: info.size)
        slots = 2 ** max(10, int(math.log2(max(largest.size, 2))))
        while slots > 1024:
            slots //= 2
            if slots + 1 < largest.size:
                infos = [
                    dataclasses.replace(i, size=slots + 1, hashed=slots) if i is largest else i
                    for i in self.field_map.fields
                ]
                yield (
                    said(
                        f"raise min_count of the field '{largest.name}' ({largest.size:,} "
                        f"features), or hash it (hashed: {slots})."
                    ),
                    dataclasses.replace(self, field_map=FieldMap(tuple(infos))),
                )

    def _with(
        self, changes: dict[str, dict[str, object]], systems: list[dict[str, object]] | None = None
    ) -> "Plan":
        settings = self.config.model_dump()
        for section, keys in changes.items():
            settings[section] = {**settings[section], **keys}
        if systems is not None:
            settings["systems"] = systems
        return dataclasses.replace(self, config=Config.model_validate(settings))


def of_trial(config: Config, trial: Trial, cores: int) -> Plan:
    """Return the plan for this machine, after timing steps of the networks on it."""
    field_map = trial.fields.field_map
    steps = {
        system.name: step_time(system.system, config.training_of(system), field_map, cores)
        for system in config.systems
        if system.system != "lr"
    }
    workspace = config.workspace_path
    disk = None
    if isinstance(workspace, Path):
        there = next(path for path in (workspace, *workspace.parents) if path.is_dir())
        disk = psutil.disk_usage(str(there)).free
    memory = psutil.virtual_memory().total
    return Plan(config, field_map, trial, steps, Machine(cores, memory, disk, *rank_start()))
