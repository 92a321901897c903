"""Measures on this machine how long a rank takes to start and for a step of each network."""

import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.parameters import BYTES
from lc_spark.systems import SystemKind, Training
from lc_spark.training import models
from lc_spark.training.learner import Learner
from lc_spark.training.loader import Batch
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
    shrink = max(1.0, field_map.d * width * BYTES / TABLE_BYTES)
    sizes = [max(2, int(info.size / shrink)) for info in field_map.fields]
    small = FieldMap(
        tuple(
            FieldInfo(info.name, info.kind, size, max_values=info.max_values)
            for info, size in zip(field_map.fields, sizes, strict=True)
        )
    )
    batch = _random_batch(small, settings.batch_size)
    with joined(settings.device) as world:
        torch.set_num_threads(max(1, cores // settings.ranks))
        model = models.build(system, small, settings)
        if _m1_stands_still(settings) and isinstance(model, models.LcNetwork):
            model.m1.weight.requires_grad_(False)
        learner = Learner(model, settings, STEPS + 1, world)
        training, scoring = [], []
        for step in range(STEPS + 1):
            learner.model.train()
            started = time.perf_counter()
            learner.step(batch, step)
            trained = time.perf_counter()
            learner.model.eval()
            learner.logits(batch).sum().item()
            training.append(trained - started)
            scoring.append(time.perf_counter() - trained)
    return StepTime(float(np.median(training[1:])), float(np.median(scoring[1:])))


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
