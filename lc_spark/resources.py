"""Measures what a stage takes: the peak memory of this process and all that it started, and bytes.

On a cluster it sees the driver's machine alone: executors and ranks elsewhere are not in it.
"""

import contextlib
import datetime
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from lc_spark import facts
from lc_spark.config import Config
from lc_spark.facts import Facts
from lc_spark.files import AnyPath
from lc_spark.paper import Table

SECONDS = 0.5  # between two looks
LARGE = 10**9  # bytes
FOLDERS = ("tables", "shards", "models")  # that stages write to
UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0}
CHANGED = ("mtime", "LastModified", "last_modified")  # what file systems of fsspec call it


class PeakMemory:
    """The largest memory of the process tree that was seen, in bytes."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, tree_bytes())
            if self._ended.wait(SECONDS):
                return


@contextlib.contextmanager
def watched() -> Iterator[PeakMemory]:
    """Watch the memory of the process tree, every half second while the block runs."""
    peak = PeakMemory()
    thread = threading.Thread(target=peak._watch, name="peak memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        peak._ended.set()
        thread.join()


def tree_bytes() -> int:
    """Return the memory of this process and its descendants; pages that they share count once.

    Under spark-submit the JVM is this process' parent, and counts with what it started.
    """
    root = psutil.Process(os.getppid() if "PYSPARK_GATEWAY_PORT" in os.environ else os.getpid())
    return sum(_bytes_of(process) for process in [root, *root.children(recursive=True)])


def _bytes_of(process: psutil.Process) -> int:
    """Return a process' share of the memory that it holds; 0 for one that is gone.

    What a large process shares is a small part of it, and to add up shares takes 20 ms a GB.
    """
    try:
        resident = int(process.memory_info().rss)
        if resident > LARGE:
            return resident
        return int(getattr(process.memory_full_info(), "pss", resident))  # Linux alone has it
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def written_bytes(config: Config, since: float) -> int:
    """Return the bytes of the run's tables, shards and models written since a time (of epoch)."""
    places = {
        folder / name for folder in (config.workspace_path, config.run_path) for name in FOLDERS
    }
    return sum(folder_bytes(place, since) for place in places)


def folder_bytes(folder: AnyPath, since: float = 0.0) -> int:
    """Return the bytes of the files under a folder that were written since a time (of epoch)."""
    if isinstance(folder, Path):
        stats = [found.stat() for found in folder.rglob("*") if found.is_file()]
        return sum(stat.st_size for stat in stats if stat.st_mtime >= since)
    folder.fs.invalidate_cache()
    found = folder.fs.find(folder.path, detail=True).values()
    return sum(int(info["size"]) for info in found if _changed(info) >= since)


def _changed(info: dict[str, Any]) -> float:
    """Return when a file of fsspec was written, in seconds of epoch."""
    when = next((info[key] for key in CHANGED if key in info), 0.0)
    return when.timestamp() if isinstance(when, datetime.datetime) else float(when)


def rows_of(config: Config, stage: str, made: Facts) -> int | None:
    """Return the rows that a stage worked through, None where it has none (see `table`)."""
    if stage == "train_lr":
        return int(facts.read(config, "features")["shard_rows"]["train"])
    if stage == "train_lc":
        looks = [look for result in made["systems"].values() for look in result["epochs"]]
        # Systems that were trained before keep the looks of then.
        before = sum(look["seconds"] for look in looks) > made["seconds"]
        return None if before else sum(int(look["rows"]) for look in looks)
    if stage == "evaluate":
        return sum(int(result["test_rows"]) for result in made["results"])
    key = {"ingest": "source_rows", "features": "raw_rows", "score": "rows"}.get(stage)
    return None if key is None else int(made[key])


def noted(config: Config, stage: str, made: Facts, peak: PeakMemory, began: float) -> Facts:
    """Return the facts of what a stage took, whose other facts, `seconds` among them, are made."""
    rows = rows_of(config, stage, made)
    found: Facts = {"peak_bytes": peak.bytes, "written_bytes": written_bytes(config, began)}
    if rows is not None:
        found |= {"rows_worked": rows, "rows_per_second": rows / max(made["seconds"], 0.1)}
    return found


def metrics(made: Facts) -> dict[str, float]:
    """Return what a stage took as metrics of its MLflow run."""
    keys = ("seconds", "rows_per_second", "peak_bytes", "written_bytes")
    return {f"stage_{key}": float(made[key]) for key in keys if key in made}


def text(made: Facts) -> str:
    """Say what a stage took, such as '43 s, 5,300 rows/s, 12.1 MB written, peak 3.2 GB'."""
    parts = [f"{made['seconds']:.0f} s"]
    if "rows_per_second" in made:
        parts.append(f"{made['rows_per_second']:,.0f} rows/s")
    if made["written_bytes"]:
        parts.append(f"{size(made['written_bytes'])} written")
    return ", ".join([*parts, f"peak {size(made['peak_bytes'])}"])


def size(n_bytes: float) -> str:
    """Write a number of bytes as people read it, such as '3.2 GB'."""
    unit = next((u for u in ("GB", "MB", "kB") if n_bytes >= UNITS[u]), "B")
    return f"{n_bytes / UNITS[unit]:,.{0 if unit in ('kB', 'B') else 1}f} {unit}"


def table(done: dict[str, Facts]) -> Table:
    """Return what each stage took, as the report shows it."""
    rows = [
        {
            "stage": stage,
            "seconds": made["seconds"],
            "rows": made.get("rows_worked"),
            "rows_per_second": made.get("rows_per_second"),
            "written": made["written_bytes"] / UNITS["MB"],
            "peak": made["peak_bytes"] / UNITS["GB"],
        }
        for stage, made in done.items()
        if "peak_bytes" in made
    ]
    if rows:
        sums = {key: sum(row[key] for row in rows) for key in ("seconds", "written")}
        most = max(row["peak"] for row in rows)
        rows.append(
            {"stage": "together", **sums, "rows": None, "rows_per_second": None, "peak": most}
        )
    return Table(
        "stages",
        "What each stage took",
        "Rows: those of the source (ingest), of raw (features), of the train split (train_lr, "
        "which passes over them many times), and those that the steps of all systems and epochs "
        "saw (train_lc). Written: files of tables, shards and models. Memory: the most that the "
        "driver, Spark's JVM, its Python workers and the ranks held together, looked at every half "
        "second on the driver's machine alone; on a cluster executors elsewhere are not in it.",
        {
            "stage": ("stage", ""),
            "seconds": ("seconds", ",.1f"),
            "rows": ("rows", ",d"),
            "rows_per_second": ("rows/s", ",.0f"),
            "written": ("MB written", ",.1f"),
            "peak": ("peak memory, GB", ",.2f"),
        },
        rows,
    )
