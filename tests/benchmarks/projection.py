"""What a run of AppData's shape says of larger logs, and which part of memory is full first.

    python tests/benchmarks/projection.py WORKSPACE     # of lc-spark run conf/appdata.yaml

Time: the stages' seconds there, times the cores that they had, over what they grow with: `train_lc`
with rows times the MLP's weights, all others with values (rows times fields). Nothing is taken off
for a larger machine and nothing added for a network between machines, so read core-hours as the
work that there is, not as a promise. Memory: bytes a feature, as the code reckons them before it
begins and refuses what does not fit; a host that all of it lies on has so many GB.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

from lc_spark.features.memory import COLLECTING, IN_A_WORKER, TEXTS
from lc_spark.field_map import FieldMap
from lc_spark.parameters import BYTES, copies_bytes, parameter_count
from lc_spark.plan import TEXT_BYTES
from lc_spark.training.lr_choice import mllib_bytes
from lc_spark.training.lr_network import lr_bytes

STAGES = ("ingest", "features", "train_lr", "train_lc", "evaluate", "gate")
HIDDEN, FOLDS = (2048, 1024), 5
# Name -> rows and fields. The second is what the paper's other log has.
LOGS = {
    "this run": None,
    "FeedsData": (110_229_536, 2_311),
    "10 billion rows": (10_000_000_000, 158),
}
HOSTS = (24, 64, 256)  # GB
# What is held -> bytes of it for d features: on the driver, in a worker or in a rank.
HELD: dict[str, Callable[[int], int]] = {
    "MLlib's dense vectors, driver and 2 tasks": lambda d: mllib_bytes(d, 2),
    "vocabulary while collected, driver": lambda d: d * (COLLECTING + TEXTS * TEXT_BYTES),
    "six LRs by torch (5 folds), a rank": lambda d: lr_bytes(d, 1 + FOLDS, 1),
    "M1 and five frozen copies, a rank": lambda d: BYTES * d + copies_bytes(FOLDS, d, "frozen"),
    "two LRs by torch (no folds), a rank": lambda d: lr_bytes(d, 1, 2),
    "vocabulary in use, a Python worker": lambda d: d * IN_A_WORKER,
    "M1 from a random start, a rank": lambda d: d * BYTES,
}


def mlp_weights(f: int) -> int:
    """Return the weights of the MLP over f fields."""
    return parameter_count("lc_dnn", 0, f, HIDDEN).weights


def core_seconds(workspace: Path, cores: int) -> dict[str, float]:
    """Return what each stage took, times the cores."""
    facts = {s: json.loads((workspace / "stages" / f"{s}.json").read_text()) for s in STAGES}
    return {stage: facts[stage]["seconds"] * cores for stage in STAGES}


def print_time(workspace: Path, cores: int) -> None:
    """Print core-hours and disk by log."""
    features = json.loads((workspace / "stages" / "features.json").read_text())
    rows = features["raw_rows"]
    f = len(FieldMap.read(workspace / "field_map.json").fields)
    taken = core_seconds(workspace, cores)
    written = {
        stage: json.loads((workspace / "stages" / f"{stage}.json").read_text())["written_bytes"]
        for stage in ("ingest", "features")
    }
    print(f"core-hours ({cores} cores here: {rows:,} rows x {f} fields)\n")
    print("| log | rows | fields | " + " | ".join(STAGES) + " | together | raw and shards TB |")
    print("|---" * (len(STAGES) + 5) + "|")
    for name, shape in LOGS.items():
        n, fields = shape or (rows, f)
        by_values = n * fields / (rows * f)
        by_mlp = n * mlp_weights(fields) / (rows * mlp_weights(f))
        hours = [
            taken[stage] * (by_mlp if stage == "train_lc" else by_values) / 3600 for stage in STAGES
        ]
        cells = " | ".join(f"{h:,.1f}" for h in [*hours, sum(hours)])
        disk = sum(written.values()) * by_values / 1e12
        print(f"| {name} | {n:,} | {fields:,} | {cells} | {disk:,.2f} |")


def print_memory() -> None:
    """Print bytes a feature, and the d at which a host is full, the smallest first."""
    d = 10**9
    print("\nthe d, in millions, that fills so much memory\n")
    print("| what is held | bytes a feature | " + " | ".join(f"{gb} GB" for gb in HOSTS) + " |")
    print("|---" * (2 + len(HOSTS)) + "|")
    for name, held in sorted(HELD.items(), key=lambda pair: -pair[1](d)):
        each = held(d) / d
        most = " | ".join(f"{gb * 1e9 / each / 1e6:,.0f}" for gb in HOSTS)
        print(f"| {name} | {each:.0f} | {most} |")


def main() -> None:
    """Parse, print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="that the run had")
    arguments = parser.parse_args()
    print_time(arguments.workspace, arguments.cores)
    print_memory()


if __name__ == "__main__":
    main()
