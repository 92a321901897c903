"""Turns a system of the config into a training run on the executors, through TorchDistributor."""

import dataclasses
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.ml.torch.distributor import TorchDistributor
from pyspark.sql import SparkSession

from lc_spark import tracking
from lc_spark.config import Config, System
from lc_spark.errors import LcSparkError
from lc_spark.training.loop import TrainSpec, run_rank


def launch(
    spark: SparkSession, config: Config, system: System, run_id: str | None
) -> dict[str, Any]:
    """Train a system with training.ranks ranks, a barrier task each; return loop.train's result.

    Needs the shards and, unless training.start is random, the LR model in the workspace; leaves the
    model in models/<name>. Metrics go to the MLflow run, if there is one. Executors must have
    lc_spark installed and see the workspace folder. Raises LcSparkError when training fails.
    """
    training = config.training_of(system)
    _check_slots(spark, training.ranks)
    spec = _spec(config, system, run_id)
    distributor = TorchDistributor(
        num_processes=training.ranks, local_mode=False, use_gpu=training.device == "cuda"
    )
    # Between the ranks and the driver stands a process that prints to a pipe: without this the
    # progress bar would come all at once, at its end.
    spark.sparkContext.environment["PYTHONUNBUFFERED"] = "1"
    try:
        result = distributor.run(run_rank, dataclasses.asdict(spec))
    except (PySparkException, Py4JJavaError, RuntimeError) as error:
        raise LcSparkError(
            f"Training '{system.name}' ended on an executor: {_reason(str(error))} Its output is "
            "above. Started again, it goes on from the last whole epoch."
        ) from error
    assert result is not None, "rank 0 returns a result or an error"
    if "error" in result:
        raise LcSparkError(f"Training '{system.name}': {result['error']}")
    return dict(result)


def _spec(config: Config, system: System, run_id: str | None) -> TrainSpec:
    if system.system == "lr":
        raise LcSparkError(f"'{system.name}' is an lr: the train_lr stage trains it.")
    training = config.training_of(system)
    workspace = config.workspace_path
    return TrainSpec(
        name=system.name,
        system=system.system,
        training=training.model_dump(mode="json"),
        shards=str(workspace / "shards"),
        field_map=str(workspace / "field_map.json"),
        lr_model=None if training.start == "random" else str(workspace / "models" / "lr"),
        output=str(workspace / "models" / system.name),
        seed=config.seed,
        digest=config.digest(),
        tracking_uri=None if run_id is None else tracking.uri_of(config),
        run_id=run_id,
    )


def _check_slots(spark: SparkSession, ranks: int) -> None:
    """Refuse more ranks than a local master has cores; Spark itself would try for a minute."""
    master, cores = str(spark.sparkContext.master), spark.sparkContext.defaultParallelism
    if master.startswith("local") and cores < ranks:
        raise LcSparkError(
            f"training.ranks is {ranks}, but {master} runs {cores} "
            f"tasks at a time: set spark.master to local[{ranks}] or lower training.ranks."
        )


def _reason(text: str) -> str:
    """Return the most telling line of a failed task's output."""
    lines = [line.strip() for line in text.splitlines()]
    errors = [line for line in lines if "Error: " in line and not line.startswith("Caused by")]
    return (errors or lines)[-1].rstrip(".") + "."
