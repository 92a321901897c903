"""Measures on this machine how long a rank takes to start and for a step of each network."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.parameters import BYTES
from lc_spark.systems import Lr, SystemKind, Training
from lc_spark.training import models
from lc_spark.training.learner import Learner
from lc_spark.training.loader import Batch
from lc_spark.training.lr_network import LrNetwork, Part, Rows, logits
from lc_spark.training.world import joined

STEPS = 5  # timed, after one that is not
TABLE_BYTES = 500_000_000  # larger tables are timed at this size: a step reads few of their rows
STARTED = "import lc_spark.training.loop, psutil; print(psutil.Process().memory_info().rss)"


@dataclass(frozen=True)
class StepTime:
    """Seconds of a training step of batch_size rows, and of scoring as many."""

    training: float
    scoring: float


def step_time(system: SystemKind, settings: Training, field_map: FieldMap, cores: int) -> StepTime:
    """Time steps on random rows of a field map, with the threads that a rank will have.

    The median of a few, on the CPU or the GPU that the settings name. What ranks wait for each
    other is not in it.
    """
    width = settings.hidden[0] if system == "dnn" else settings.channels + 1
    small = _smaller(field_map, width * BYTES)
    batch = _random_batch(small, settings.batch_size)
    with joined(settings.device) as world:
        torch.set_num_threads(max(1, cores // settings.ranks))
        model = models.build(system, small, settings)
        if _m1_stands_still(settings) and isinstance(model, models.LcNetwork):
            model.m1.weight.requires_grad_(False)
        learner = Learner(model, settings, STEPS + 1, world)

        def train(step: int) -> None:
            learner.model.train()
            learner.step(batch, step)

        def score() -> None:
            learner.model.eval()
            learner.logits(batch).sum().item()

        return _timed(train, score)


def lr_step_time(
    settings: Lr, training: Training, parts: int, field_map: FieldMap, cores: int
) -> StepTime:
    """Time steps of all LRs that torch fits together, likewise."""
    n = parts * len(settings.l2)
    small = _smaller(field_map, 2 * n * BYTES)
    with joined(training.device) as world:
        torch.set_num_threads(max(1, cores // training.ranks))
        batch = _random_batch(small, settings.batch_size)
        ids, labels, folds = (t.to(world.device) for t in (batch.ids, batch.labels, batch.folds))
        values = None if batch.values is None else batch.values.to(world.device)
        rows = Rows(ids, values, labels, folds, None)
        seen = [Part("lr", 1), *(Part(f"fold {i}", 1, fold=i) for i in range(parts - 1))]
        rate = settings.learning_rate
        network = LrNetwork(small.d, seen, settings.l2, rate, STEPS + 1, 1, world)
        weights = network.optimiser.weights[:, : max(parts, len(settings.l2))].contiguous()
        bias = network.optimiser.bias[: weights.shape[1]]

        def train(step: int) -> None:
            network.step(rows)

        def score() -> None:
            logits(weights, bias, rows.ids_BC, rows.values_BC).sum().item()

        return _timed(train, score)


def _timed(train: Callable[[int], None], score: Callable[[], None]) -> StepTime:
    training, scoring = [], []
    for step in range(STEPS + 1):
        started = time.perf_counter()
        train(step)
        trained = time.perf_counter()
        score()
        training.append(trained - started)
        scoring.append(time.perf_counter() - trained)
    return StepTime(float(np.median(training[1:])), float(np.median(scoring[1:])))


def _smaller(field_map: FieldMap, bytes_a_feature: int) -> FieldMap:
    """Return the field map with as many features as TABLE_BYTES have room for."""
    shrink = max(1.0, field_map.d * bytes_a_feature / TABLE_BYTES)
    return FieldMap(
        tuple(
            FieldInfo(
                info.name, info.kind, max(2, int(info.size / shrink)), max_values=info.max_values
            )
            for info in field_map.fields
        )
    )


def _m1_stands_still(settings: Training) -> bool:
    """Return whether most of the training reads an M1 that no step changes."""
    held_out = settings.start in ("lr_cross_fitted", "lr_past") and settings.m1 == "frozen"
    return settings.channels == 1 and (settings.start == "frozen" or held_out)


def _random_batch(field_map: FieldMap, rows: int) -> Batch:
    random = np.random.default_rng(0)
    encoded = {}
    for info in field_map.fields:
        shape = (rows, info.max_values) if info.kind == "multivalued" else (rows,)
        # By the square: some values are much more frequent than others, as in a log.
        indices = (info.size * random.random(shape) ** 2).astype(np.int32)
        continuous = info.kind == "continuous"
        encoded[info.name] = random.normal(size=rows) if continuous else indices
    ids, values = models.to_tensors(encoded, field_map)
    labels = torch.from_numpy((random.random(rows) < 0.5).astype(np.float32))
    zeros = torch.zeros(rows, dtype=torch.int64)
    return Batch(ids, values, labels, zeros, zeros)


def rank_start() -> tuple[float, int]:
    """Start a process with what a rank imports; return its seconds and its memory in bytes."""
    started = time.perf_counter()
    command = [sys.executable, "-c", STARTED]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return time.perf_counter() - started, int(said.split()[-1])
