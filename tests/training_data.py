"""Made-up rows whose best possible AUC is known, as shards, and ranks as real processes."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.systems import SystemKind, Training
from lc_spark.training import models
from lc_spark.training.spec import TrainSpec

FIELD_MAP = FieldMap(
    (
        FieldInfo("site", "categorical", 40, column="site"),
        FieldInfo("price", "continuous", 2, column="price", low=-9, high=9),
        FieldInfo("tags", "multivalued", 12, column="tags", max_values=3),
        FieldInfo("hour", "bucketed", 25, column="hour", cut_points=tuple(range(1, 24))),
    )
)
FOLDS, DAYS, FIRST_DATE = 3, 10, 19_000
CATEGORICAL_MAP = FieldMap((FIELD_MAP.fields[0], FIELD_MAP.fields[3]))


def make_rows(n: int, seed: int) -> dict[str, NDArray[Any]]:
    """Return encoded columns, labels, and the true logits that the labels were drawn by."""
    random = np.random.default_rng(seed)
    effects = np.random.default_rng(99)
    site_effect, hour_effect = effects.normal(0, 1, 40), effects.normal(0, 1, 25)
    site = random.integers(0, 40, n).astype(np.int32)
    hour = random.integers(0, 25, n).astype(np.int32)
    price = random.normal(0, 1, n).astype(np.float32)
    price[random.random(n) < 0.1] = np.nan
    tags = np.sort(random.integers(0, 12, (n, 3)), axis=1).astype(np.int32)
    tags[random.random(n) < 0.3, 2] = -1
    tags[random.random(n) < 0.3, 1:] = -1
    linear = site_effect[site] + hour_effect[hour] + 0.5 * np.nan_to_num(price)
    # Two fields together: what LR cannot say and an MLP over l0 can.
    logits = linear + 1.5 * np.sign(site_effect[site] * hour_effect[hour])
    labels = (random.random(n) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    columns = {"site": site, "price": price, "tags": tags, "hour": hour}
    return {**columns, "label": labels, "true_logits": logits, "linear": linear}


def write_shards(
    folder: Path, field_map: FieldMap, row_groups: Mapping[str, Sequence[int]], seed: int = 0
) -> dict[str, Any]:
    """Write field_map.json and shards with the given row groups a split; return the manifest.

    Row ids count on through train, valid and test.
    """
    field_map.write(folder / "field_map.json")
    shards = folder / "shards"
    manifest: dict[str, Any] = {"fingerprint": field_map.fingerprint, "seed": seed, "splits": {}}
    manifest["folds"] = FOLDS
    next_id = 0
    for split, groups in {"train": (), "valid": (), "test": (), **row_groups}.items():
        (shards / f"split={split}").mkdir(parents=True)
        positives = 0.0
        for i, size in enumerate(groups):
            rows = make_rows(size, seed + next_id)
            columns = {
                "row_id": np.arange(next_id, next_id + size),
                "label": rows["label"],
                "fold": np.arange(next_id, next_id + size, dtype=np.int32) % FOLDS,
                "date": (FIRST_DATE + np.arange(size) % DAYS).astype(np.int32),
                **{f.name: _column(rows[f.name]) for f in field_map.fields},
            }
            path = shards / f"split={split}" / f"part-{i:05d}-made-up.c000.zstd.parquet"
            pq.write_table(pa.table(columns), path, compression="zstd", row_group_size=size)
            path.with_name(f".{path.name}.crc").write_bytes(b"crc")
            next_id += size
            positives += float(rows["label"].sum())
        manifest["splits"][split] = {
            "rows": sum(groups),
            "positives": int(positives),
            "row_groups": list(groups),
            "last_date": FIRST_DATE + DAYS - 1,
        }
        (shards / f"split={split}" / "_SUCCESS").touch()
    (shards / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return manifest


def _column(values: NDArray[Any]) -> Any:
    return pa.array(list(values)) if values.ndim == 2 else values


def make_spec(folder: Path, system: str = "lc_dnn", **settings: Any) -> TrainSpec:
    """Return a spec over the shards in folder, with a small network and a random start."""
    training = Training.model_validate(
        {
            "hidden": [16, 8],
            "batch_size": 64,
            "epochs": 3,
            "start": "random",
            "learning_rate": 1e-3,
            "evaluations": 1,
            **settings,
        }
    )
    return TrainSpec(
        name=system,
        system=cast(SystemKind, system),
        training=training.model_dump(mode="json"),
        shards=str(folder / "shards"),
        field_map=str(folder / "field_map.json"),
        output=str(folder / "models" / system),
        seed=7,
        lr_model=str(folder / "models" / "lr"),
    )


def write_lr(folder: Path, field_map: FieldMap, weights: NDArray[Any], name: str = "lr") -> str:
    """Write an LR model with the given weights [d], by default where make_spec looks for it."""
    lr_model = models.Lr.from_weights(weights, 0.25)
    models.save(lr_model, folder / "models" / name, field_map.fingerprint, {})
    return str(folder / "models" / name)


# A thread of a group that outlived its end could abort the process at its exit.
_RANK = """
import json, sys
from pathlib import Path
from lc_spark.training.loop import run_rank
[result] = run_rank([json.loads(sys.argv[1])])
threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in threads if "gloo" in name], threads
print("RESULT " + json.dumps(result), flush=True)
"""


def start_ranks(spec: Any, size: int, code: str = _RANK) -> list[subprocess.Popen[str]]:
    """Start one process a rank, as torchrun would; stdout and stderr come through one pipe.

    code gets the spec's fields as JSON, by default to train a network of a TrainSpec.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(asdict(spec))],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]


def run_ranks(spec: Any, size: int, code: str = _RANK) -> tuple[dict[str, Any], str]:
    """Run all ranks to their end; return rank 0's result and its output."""
    processes = start_ranks(spec, size, code)
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    result = next(line for line in outputs[0].splitlines() if line.startswith("RESULT "))
    return json.loads(result.removeprefix("RESULT ")), outputs[0]
