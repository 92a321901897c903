"""How long a model of d features takes to load, and the memory that it then holds.

    python tests/benchmarks/model_load.py [--features 1000000] [--fields 40]

Makes a bundle (LC-DNN, k = 1, [256, 128], d features in equal categorical fields, a vocabulary of
as many hashes) and loads it in fresh processes, five times.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from lc_spark.encoder import Vocabulary
from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.systems import Training
from lc_spark.training import models

LOAD = """
import json, os, sys, time
from pathlib import Path
import psutil
from lc_spark.training.scorer import Scorer
import pandas as pd
before, started = psutil.Process().memory_info().rss, time.perf_counter()
scorer = Scorer(Path(sys.argv[1]))
loaded = time.perf_counter() - started
scorer.score_pandas(pd.DataFrame({"f0": ["x"]}))
held = psutil.Process().memory_info().rss - before
print(json.dumps([loaded, held / 2**20, before / 2**20]))
"""
REPEATS = 5


def make_bundle(folder: Path, features: int, fields: int) -> None:
    """Write a bundle with random weights and a random vocabulary."""
    random = np.random.default_rng(1)
    size = features // fields
    entries, infos = {}, []
    for number in range(fields):
        hashes = np.unique(random.integers(-(2**63), 2**63, size - 2))
        name = f"f{number}"
        entries[name] = (hashes, np.arange(2, len(hashes) + 2, dtype=np.int32))
        infos.append(
            FieldInfo(name, "categorical", len(hashes) + 2, column=name, column_type="string")
        )
    field_map = FieldMap(tuple(infos))
    network = models.build("lc_dnn", field_map, Training(hidden=(256, 128)))
    models.save(network, folder, field_map.fingerprint, {})
    field_map.write(folder / "field_map.json")
    Vocabulary(entries).write(folder / "vocabulary.parquet")


def main() -> None:
    """Parse, make, load, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=1_000_000)
    parser.add_argument("--fields", type=int, default=40)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_bundle(Path(folder), arguments.features, arguments.fields)
        files = {path.name: path.stat().st_size / 2**20 for path in sorted(Path(folder).iterdir())}
        runs = []
        for _ in range(REPEATS):
            command = [sys.executable, "-c", LOAD, folder]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            runs.append(json.loads(said.splitlines()[-1]))
    seconds, held, before = (statistics.median(run[i] for run in runs) for i in range(3))
    print("| d | files MiB | load s | memory held MiB | process before MiB |")
    print("|---|---|---|---|---|")
    size = sum(files.values())
    print(f"| {arguments.features:,} | {size:.1f} | {seconds:.2f} | {held:.0f} | {before:.0f} |")
    print("files: " + ", ".join(f"{name} {mib:.1f} MiB" for name, mib in files.items()))


if __name__ == "__main__":
    main()
