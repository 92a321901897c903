"""Tries training settings one at a time and prints what each is worth on the validation rows.

    python tests/benchmarks/defaults.py conf/flights.yaml [--start lr_cross_fitted] [--seeds 1,2]

Base: the config's own `training` with BASE on top, one rank with the batches of all its ranks
together. The test rows are not read. Runs that were done before are not repeated. On a busy machine
give it one core (taskset -c 0): torch's threads then do not wait for each other.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from lc_spark import config_file, pipeline, session, tracking
from lc_spark.config import Config
from lc_spark.systems import System
from lc_spark.training import launch
from lc_spark.training.loop import train

BASE: dict[str, Any] = {"ranks": 1, "evaluations": 2, "learning_rate": 1e-3}

# One change each; the first is the base.
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"batch_norm": False},
    {"dropout": 0.0},
    {"dropout": 0.3},
    {"weight_decay": 1e-2},
    {"weight_decay": 1e-1},
    {"learning_rate": 3e-4},
    {"learning_rate": 3e-3},
    {"batch_size": 512},
    {"batch_size": 2048},
    {"epochs": 6, "patience": 6},
    {"hidden": [400, 400, 400]},
    {"schedule": "constant"},
    {"learning_rate": 3e-3, "epochs": 6, "patience": 6},
    {"learning_rate": 3e-3, "hidden": [400, 400, 400]},
    {"m1": "joint", "m1_learning_rate": 1e-3},
    {"m1": "joint", "m1_learning_rate": 1e-4},
    {"joint_epochs": 1, "m1_learning_rate": 1e-4},
    {"start": "lr", "m1_learning_rate": 1e-3},
    {"start": "lr"},
    {"start": "random", "m1_learning_rate": 1e-3},
    {"start": "random"},
    {"start": "random", "m1_learning_rate": 3e-2},
    {"start": "random", "m1_weight_decay": 1e-1},
    {"channels": 8},
    {"channels": 8, "m1_learning_rate": 1e-3},
    {"channels": 8, "m1_weight_decay": 1e-1},
    {"channels": 16, "m1_learning_rate": 1e-3},
)


STAGES = ("ingest", "features", "train_lr")


def prepare(config: Config, stages: tuple[str, ...] = STAGES) -> None:
    """Run the stages up to LR, or those given, unless they were run before."""
    spark = session.start(config)
    parent = tracking.start_pipeline(config, {"kind": "benchmark"})
    for stage in stages:
        pipeline.ensure_stage(stage, spark, config, parent)
    tracking.end_run(config, parent, "FINISHED")
    spark.stop()


def main() -> None:
    """Parse, train, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--start", default="lr_cross_fitted")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--workspace", default="workspace/benchmark")
    arguments = parser.parse_args()
    given = config_file.load(arguments.config)
    ranks = given.training.ranks
    base = {
        **given.training.model_dump(),
        **BASE,
        "start": arguments.start,
        "batch_size": given.training.batch_size * ranks,
    }
    config = Config.model_validate(
        {
            **given.model_dump(),
            "workspace": f"{arguments.workspace}/{given.name}",
            "training": base,
            "systems": [{"system": "lr"}, {"system": "lc_dnn"}],
        }
    )
    prepare(config)
    print(f"| {given.name} | valid log loss | valid AUC | best epoch | s/epoch |")
    print("|---|---|---|---|---|", flush=True)
    for number, change in enumerate(CHANGES):
        results = []
        for seed in map(int, arguments.seeds.split(",")):
            system = System(
                system="lc_dnn", name=f"try_{number}_{seed}", training={**base, **change}
            )
            results.append(train(launch.train_spec(config, system, None, seed)))
        mean = {
            key: statistics.mean(result[key] for result in results)
            for key in ("best_valid_logloss", "best_valid_auc", "best_epoch", "seconds_per_epoch")
        }
        what = ", ".join(f"{k} {v}" for k, v in change.items()) or f"base, start {base['start']}"
        print(
            f"| {what} | {mean['best_valid_logloss']:.5f} | {mean['best_valid_auc']:.4f} | "
            f"{mean['best_epoch']:.2g} | {mean['seconds_per_epoch']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
