"""Turns a system of the config into a training run on the executors, through TorchDistributor."""

import dataclasses
import datetime
import itertools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.ml.torch.distributor import TorchDistributor
from pyspark.sql import SparkSession

from lc_spark import facts, refresh, tracking
from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.features import shards
from lc_spark.refresh import Parent
from lc_spark.systems import System, Training
from lc_spark.training import lr
from lc_spark.training.loop import run_rank
from lc_spark.training.lr_loop import LrSpec, run_lr_rank
from lc_spark.training.lr_network import Part
from lc_spark.training.spec import TrainSpec

MOST_TASKS = 10_000  # of a stage that are looked through


def launch(
    spark: SparkSession, config: Config, systems: Sequence[System], run_ids: Sequence[str | None]
) -> list[dict[str, Any]]:
    """Train systems one after the other, each by training.ranks ranks; return loop.train's results.

    Needs the shards and, unless training.start is random, the LR models in the workspace; leaves
    the models in models/<name>. Metrics go to the MLflow runs, where there is one. Executors must
    have lc_spark, installed or by --py-files, and see the workspace. A system that cannot be
    trained has {"error": sentence} in place of its result. Raises LcSparkError when a rank dies.
    """
    specs = [train_spec(config, *pair) for pair in zip(systems, run_ids, strict=True)]
    return launch_specs(spark, specs)


def launch_specs(spark: SparkSession, specs: Sequence[TrainSpec]) -> list[dict[str, Any]]:
    """Run specs as launch does."""
    results: list[dict[str, Any]] = []
    # Ranks take longer to start than a small network to train: neighbours share them.
    alike = itertools.groupby(specs, key=lambda s: (s.training["ranks"], s.training["device"]))
    for (ranks, device), group in alike:
        together = list(group)
        names = ", ".join(spec.name for spec in together)
        fields = [dataclasses.asdict(spec) for spec in together]
        results += _run(spark, names, run_rank, fields, ranks, device)
    return results


def launch_lr(spark: SparkSession, config: Config, parts: Sequence[Part]) -> dict[str, Any]:
    """Train the LRs of parts, the first of all rows, by training.ranks ranks together.

    Returns lr_loop.run_lr_rank's result; leaves models/<part> and lr_loop.WEIGHTS_FILE in the run's
    folder. Raises LcSparkError when they cannot be trained or a rank dies.
    """
    spec = LrSpec(
        folder=str(config.run_path),
        parts=[dataclasses.asdict(part) for part in parts],
        l2=sorted(config.lr.l2, reverse=True),
        epochs=config.lr.epochs,
        batch_size=config.lr.batch_size,
        learning_rate=config.lr.learning_rate,
        device=config.training.device,
        seed=config.seed,
    )
    fields, training = dataclasses.asdict(spec), config.training
    result: dict[str, Any] = _run(spark, "lr", run_lr_rank, fields, training.ranks, training.device)
    if "error" in result:
        raise LcSparkError(result["error"])
    return result


def _submitted_files(spark: SparkSession) -> str:
    """Return a PYTHONPATH with what --py-files named, for the ranks.

    Spark puts it on the path of its Python workers alone, and a rank is a process that one of them
    starts. On an executor the files lie in the working folder, on a local master where they were.
    """
    files = spark.sparkContext.getConf().get("spark.submit.pyFiles", "")
    paths = [PurePosixPath(urlsplit(file).path) for file in str(files).split(",") if file]
    return os.pathsep.join(place for path in paths for place in (path.name, str(path)))


def _run(
    spark: SparkSession,
    names: str,
    function: Callable[[Any], Any],
    argument: Any,
    ranks: int,
    device: str,
) -> Any:
    """Call a function of lc_spark with an argument on each rank; return what rank 0's returns."""
    _check_slots(spark, ranks)
    environment = spark.sparkContext.environment
    # Between the ranks and the driver stands a process that prints to a pipe: without this the
    # progress bar would come all at once, at its end.
    environment["PYTHONUNBUFFERED"] = "1"
    environment["PYTHONPATH"] = _submitted_files(spark)
    distributor = TorchDistributor(num_processes=ranks, local_mode=False, use_gpu=device == "cuda")
    try:
        results = distributor.run(function, argument)
    except (PySparkException, Py4JJavaError, RuntimeError) as error:
        raise LcSparkError(
            f"Training {names} ended: {_reason(spark, str(error), ranks)} The ranks' output is "
            "above. Started again, a system goes on from its last whole epoch."
        ) from error
    assert results is not None, "rank 0 returns results"
    return results


def train_spec(
    config: Config,
    system: System,
    run_id: str | None,
    seed: int | None = None,
    watch: tuple[str, ...] = (),
) -> TrainSpec:
    """Return what the ranks need to know of a system; the seed is the config's by default."""
    if system.system == "lr":
        raise LcSparkError(f"'{system.name}' is an lr: the train_lr stage trains it.")
    training = config.training_of(system)
    folder = config.run_path
    parent = refresh.parent_of(config)
    if parent is not None:
        training = training.model_copy(update={"epochs": config.refresh.epochs})
    held_out = lr.held_out_folders(config, training)
    unfit = facts.read(config, "train_lr")["unfit"] if held_out else {}
    for name in (PurePosixPath(place).name for place in held_out):
        if name in unfit:
            raise LcSparkError(f"{system.name}: {unfit[name]}")
    return TrainSpec(
        name=system.name,
        system=system.system,
        training=training.model_dump(mode="json"),
        shards=str(folder / "shards"),
        field_map=str(folder / "field_map.json"),
        output=str(folder / "models" / system.name),
        seed=config.seed if seed is None else seed,
        lr_model=None if training.start == "random" else str(folder / "models" / "lr"),
        held_out_lr=held_out,
        first_date=_first_date(config, training, parent),
        parent=None if parent is None else str(parent.path(config) / "models" / system.name),
        parent_map=None if parent is None else str(parent.path(config) / "field_map.json"),
        keep_state=config.split.by == "window",
        watch=watch,
        tracking_uri=None if run_id is None else tracking.uri_of(config),
        run_id=run_id,
    )


def _first_date(config: Config, training: Training, parent: Parent | None) -> int | None:
    """Return the first day that the network trains on, in days since 1970; None for all days."""
    new = refresh.first_train_date(config, parent)
    if new is not None:
        return (new - datetime.date(1970, 1, 1)).days
    if training.start != "lr_past" or training.days is None:
        return None
    return shards.first_date(shards.read_manifest(config), training.days)


def _check_slots(spark: SparkSession, ranks: int) -> None:
    """Refuse more ranks than a local master has cores; Spark itself would try for a minute."""
    master, cores = str(spark.sparkContext.master), spark.sparkContext.defaultParallelism
    if master.startswith("local") and cores < ranks:
        raise LcSparkError(
            f"training.ranks is {ranks}, but {master} runs {cores} "
            f"tasks at a time: set spark.master to local[{ranks}] or lower training.ranks."
        )


def _reason(spark: SparkSession, text: str, ranks: int) -> str:
    """Return which rank ended, where it ran, and the most telling line of Spark's words on it."""
    lines = [line.strip() for line in text.splitlines()]
    errors = [line for line in lines if "Error: " in line and not line.startswith("Caused by")]
    reason = (errors or lines)[-1].rstrip(".") + "."
    task = re.search(r"barrier task ResultTask\((\d+), (\d+)\)", text)
    if task is None:
        return reason
    stage, rank = int(task[1]), int(task[2])  # TorchDistributor's task n is rank n
    return f"rank {rank} of {ranks} failed{_where(spark, stage, rank)}. {reason}"


def _where(spark: SparkSession, stage: int, rank: int) -> str:
    """Return the host and executor of a task, which Spark's error leaves out."""
    tasks = spark.sparkContext._jsc.sc().statusStore().taskList(stage, 0, MOST_TASKS).iterator()
    while tasks.hasNext():
        task = tasks.next()
        if task.index() == rank:
            return f" on {task.host()} (executor {task.executorId()})"
    return ""
