"""What a stage took: memory of the process tree, bytes that it wrote, and how both are said."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from upath import UPath

from lc_spark import facts, resources
from lc_spark.config import Config

MIB = 2**20


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config.model_validate(
        {
            "name": "toy",
            "workspace": str(tmp_path),
            "source": {"path": "rows.parquet"},
            "label": "y",
            "split": {"by": "hash"},
            "fields": [{"name": "a", "kind": "categorical"}],
            "systems": ["lr", "lc_dnn"],
        }
    )


# In a process of its own: the Java of the tests may grow at any time.
HOLDING = """
import subprocess, sys
from lc_spark import resources
hold = "import time; held = b'x' * (200 * 2**20); time.sleep(1.5)"
child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}], check=True)"
before = resources.tree_bytes()
with resources.watched() as peak:
    subprocess.run([sys.executable, "-c", child], check=True)
print(peak.bytes - before, peak.bytes - resources.tree_bytes())
"""


def test_the_peak_sees_what_a_child_of_a_child_held_and_gave_back() -> None:
    made = subprocess.run(
        [sys.executable, "-c", HOLDING], capture_output=True, text=True, check=True
    )
    above_before, above_after = map(int, made.stdout.split())
    assert 190 * MIB < above_before < 400 * MIB
    assert above_after > 190 * MIB


SHARING = """
import os, time
from lc_spark import resources
held = os.urandom(150 * 2**20)  # a forked child shares it
alone = resources.tree_bytes()
child = os.fork()
if child == 0:
    time.sleep(60)
try:
    print(resources.tree_bytes() - alone)
finally:
    os.kill(child, 9)
    os.waitpid(child, 0)
"""


def test_pages_that_processes_share_count_once() -> None:
    # In a process of its own: this one is large, and of large ones nothing is taken off.
    made = subprocess.run(
        [sys.executable, "-c", SHARING], capture_output=True, text=True, check=True
    )
    assert int(made.stdout) < 75 * MIB


def test_written_are_files_of_tables_shards_and_models_since_then(config: Config) -> None:
    root = Path(config.workspace)
    for name in ("tables/raw", "shards", "models/lc_dnn", "report"):
        (root / name).mkdir(parents=True)
        (root / name / "old").write_bytes(b"x" * 1_000)
        os.utime(root / name / "old", (1e9, 1e9))
    began = time.time() - 1
    (root / "tables" / "raw" / "new").write_bytes(b"x" * 20)
    (root / "models" / "lc_dnn" / "new").write_bytes(b"x" * 3)
    (root / "report" / "new").write_bytes(b"x" * 500)
    assert resources.written_bytes(config, began) == 23


def test_rows_are_those_that_a_stage_worked_through(config: Config) -> None:
    facts.write(config, "features", {"shard_rows": {"train": 700, "valid": 100, "test": 200}})
    looks = [{"rows": 640, "seconds": 2.0}, {"rows": 640, "seconds": 2.0}]
    trained = {"systems": {"lc_dnn": {"epochs": looks}, "lc_wd": {"epochs": looks}}}
    assert resources.rows_of(config, "ingest", {"source_rows": 1010, "raw_rows": 1000}) == 1010
    assert resources.rows_of(config, "train_lr", {}) == 700
    assert resources.rows_of(config, "train_lc", {**trained, "seconds": 30.0}) == 4 * 640
    trained_before = {**trained, "seconds": 5.0}
    assert resources.rows_of(config, "train_lc", trained_before) is None
    assert resources.rows_of(config, "promote", {}) is None


def test_a_line_says_what_a_stage_took() -> None:
    made = {"seconds": 43.2, "peak_bytes": 3_210_000_000, "written_bytes": 12_340_000}
    assert resources.text(made) == "43 s, 12.3 MB written, peak 3.2 GB"
    assert resources.text({**made, "written_bytes": 0, "rows_per_second": 5324.9}) == (
        "43 s, 5,325 rows/s, peak 3.2 GB"
    )
    assert resources.metrics(made) == {
        "stage_seconds": 43.2,
        "stage_peak_bytes": 3.21e9,
        "stage_written_bytes": 1.234e7,
    }


def test_the_report_lists_the_stages_that_noted_what_they_took() -> None:
    old = {"seconds": 5.0}  # noted by an earlier version
    new = {"seconds": 4.0, "rows_worked": 1000, "rows_per_second": 250.0}
    new |= {"peak_bytes": 1_500_000_000, "written_bytes": 2_500_000}
    table = resources.table({"ingest": old, "features": new})
    assert table.rows[:1] == [
        {
            "stage": "features",
            "seconds": 4.0,
            "rows": 1000,
            "rows_per_second": 250.0,
            "written": 2.5,
            "peak": 1.5,
        }
    ]
    assert resources.table({"ingest": old}).rows == []


def test_the_last_line_adds_up_seconds_and_bytes_and_has_the_highest_peak() -> None:
    made = {"seconds": 4.0, "peak_bytes": 1_500_000_000, "written_bytes": 2_500_000}
    more = {"seconds": 6.0, "peak_bytes": 900_000_000, "written_bytes": 500_000}
    last = resources.table({"ingest": made, "features": more}).rows[-1]
    assert (last["stage"], last["seconds"]) == ("together", 10.0)
    assert (last["written"], last["peak"]) == (3.0, 1.5)
    assert last["rows"] is last["rows_per_second"] is None


def test_a_folder_behind_a_uri_is_counted_as_a_local_one(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"x" * 1_000)
    os.utime(tmp_path / "old", (1e9, 1e9))
    (tmp_path / "new").write_bytes(b"x" * 7)
    behind = UPath(f"local://{tmp_path}")
    for folder in (tmp_path, behind):
        assert resources.folder_bytes(folder) == 1_007
        assert resources.folder_bytes(folder, time.time() - 100) == 7
        assert resources.folder_bytes(folder / "none") == 0
