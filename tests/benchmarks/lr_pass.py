"""How long an L-BFGS iteration of MLlib's LR takes, beside a plain pass over the same vectors.

    python tests/benchmarks/lr_pass.py [--config conf/flights.yaml] [--times 5]

The stages ingest and features must have run. The train rows' vectors are cached as train_lr caches
them. `pass` is a Spark job that takes every cached row and keeps none. `iteration` is what LONG
iterations take more than SHORT ones, by iteration: the start, the summary of the columns and the
making of blocks are not in it. They take turns after one round that is not counted.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

from pyspark import StorageLevel
from pyspark.sql import DataFrame
from turns import print_turns

from lc_spark import config_file, files, session
from lc_spark.config import Config
from lc_spark.features.shards import read_field_map
from lc_spark.features.vectors import shard_vectors
from lc_spark.training import lr

SHORT, LONG = 2, 12


def main() -> None:
    """Parse, take turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("conf/flights.yaml"))
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--times", type=int, default=5)
    arguments = parser.parse_args()
    config = config_file.load(arguments.config, arguments.set)
    spark = session.start(config)
    field_map = read_field_map(config)
    with tempfile.TemporaryDirectory() as folder:
        train_df = shard_vectors(
            spark, config, field_map, "train", files.uri(Path(folder, "train"))
        )
        train_df = train_df.persist(StorageLevel.MEMORY_AND_DISK)
        rows = train_df.count()
        seconds: dict[str, list[float]] = {"pass": [], "iteration": []}
        for number in range(arguments.times + 1):
            taken = a_pass(train_df), an_iteration(train_df, config)
            if number:
                for name, one in zip(seconds, taken, strict=True):
                    seconds[name].append(one)
    spark.stop()
    print(f"{rows:,} train rows, {field_map.d:,} features, load {os.getloadavg()[0]:.1f}")
    print_turns(seconds, "pass", rows)


def a_pass(train_df: DataFrame) -> float:
    """Return the seconds of a job that takes every row of the cache."""
    started = time.perf_counter()
    train_df.write.format("noop").mode("overwrite").save()
    return time.perf_counter() - started


def an_iteration(train_df: DataFrame, config: Config) -> float:
    """Return the seconds of one iteration of L-BFGS."""
    seconds, iterations = [], []
    for most in (SHORT, LONG):
        settings = config.lr.model_copy(update={"max_iterations": most, "tolerance": 0.0})
        fitted, _ = lr.fit_lr(
            train_df, config.model_copy(update={"lr": settings}), min(config.lr.l2)
        )
        seconds.append(fitted.seconds)
        iterations.append(fitted.iterations)
    return (seconds[1] - seconds[0]) / (iterations[1] - iterations[0])


if __name__ == "__main__":
    main()
