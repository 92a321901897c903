"""A Spark standalone cluster on this machine: a master and two workers, processes of their own.

    python tests/standalone_cluster.py FOLDER -- COMMAND...

starts one, runs COMMAND with the master's address in LC_SPARK_MASTER and takes the cluster down.
FOLDER gets the logs and what the executors write. All of it listens on 127.0.0.1 alone. The Python
package pyspark brings what is needed; the two scripts that start clusters elsewhere it leaves out.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyspark

SPARK_HOME = Path(pyspark.__file__).parent
START_SECONDS = 180.0
END_SECONDS = 10.0
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    master: str  # spark://127.0.0.1:PORT
    page: str  # of the master
    workers: tuple[subprocess.Popen[bytes], ...]
    folder: Path

    def executors(self) -> list[psutil.Process]:
        """Return the JVMs of the executors, at most one a worker here, in the workers' order."""
        found = [child for w in self.workers for child in psutil.Process(w.pid).children()]
        return [child for child in found if child.status() != psutil.STATUS_ZOMBIE]

    def environment(self) -> dict[str, str]:
        """Return this process's variables, and those that a driver on this machine needs."""
        return {**os.environ, "LC_SPARK_MASTER": self.master, "SPARK_LOCAL_IP": "127.0.0.1"}


@contextlib.contextmanager
def standalone_cluster(
    folder: Path, workers: int = 2, cores: int = 1, memory: str = "3g"
) -> Iterator[Cluster]:
    """Run a cluster whose workers have so many cores and so much memory each, and end it."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(_daemon("master", folder, "--port", "0"))
        url = _said(master, folder / "master.log", r"Starting Spark master at (spark://\S+)")
        page = _said(master, folder / "master.log", r"MasterWebUI to .* at (http://\S+)")
        sizes = ("--cores", str(cores), "--memory", memory)
        started = [
            stack.enter_context(_daemon("worker", folder, *sizes, url, name=f"worker-{number}"))
            for number in range(workers)
        ]
        _wait_for_workers(page, [master, *started], folder)
        yield Cluster(url, page, tuple(started), folder)


@contextlib.contextmanager
def _daemon(
    kind: str, folder: Path, *arguments: str, name: str = ""
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a master or worker, its log in folder, and end it with all that it started."""
    name = name or kind
    main_class = f"org.apache.spark.deploy.{kind}.{kind.capitalize()}"
    command = [str(SPARK_HOME / "bin" / "spark-class"), main_class]
    command += ["--host", "127.0.0.1", "--webui-port", "0"]
    if kind == "worker":
        command += ["--work-dir", str(folder / name)]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(folder / f"{name}-local"),
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    try:
        yield process
    finally:
        _end(process)


def _environment(local: Path) -> dict[str, str]:
    """Return the variables of a node: nothing of the shell that starts the cluster, PYTHONPATH say.

    The executors inherit them from their worker.
    """
    kept = ("PATH", "JAVA_HOME", "HOME", "LANG")
    return {
        **{key: os.environ[key] for key in kept if key in os.environ},
        "SPARK_HOME": str(SPARK_HOME),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_LOCAL_DIRS": str(local),
        "SPARK_DAEMON_MEMORY": "512m",
        "SPARK_MASTER_OPTS": "-Dspark.master.rest.enabled=false",
    }


def _end_with_parent() -> None:
    """Have the kernel end this process when the one that started it dies, by whatever cause."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started: a daemon's executors are of its process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
    process.wait()


def _said(process: subprocess.Popen[bytes], log: Path, pattern: str) -> str:
    """Return what the pattern's group finds in a log, as soon as it stands there."""
    for _ in _seconds():
        found = re.search(pattern, log.read_text(encoding="utf-8"))
        if found:
            return found[1]
        _check_alive([process], log.parent)
    raise TimeoutError(f"{log} says nothing like '{pattern}' after {START_SECONDS:.0f} s")


def _wait_for_workers(page: str, daemons: list[subprocess.Popen[bytes]], folder: Path) -> None:
    for _ in _seconds():
        with urllib.request.urlopen(f"{page}/json/") as answer:
            alive = json.load(answer)["aliveworkers"]
        if alive == len(daemons) - 1:
            return
        _check_alive(daemons, folder)
    raise TimeoutError(f"{alive} of {len(daemons) - 1} workers came: see the logs in {folder}")


def _check_alive(daemons: list[subprocess.Popen[bytes]], folder: Path) -> None:
    if any(daemon.poll() is not None for daemon in daemons):
        raise RuntimeError(f"The master or a worker ended at once: see the logs in {folder}")


def _seconds() -> Iterator[None]:
    """Yield every 0.2 s for START_SECONDS."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        yield
        time.sleep(0.2)


def main(folder: str, command: list[str]) -> int:
    """Run a command while a cluster is up; return its exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with standalone_cluster(Path(folder).resolve()) as cluster:
        print(f"Cluster     {cluster.master}, two workers; logs in {folder}", flush=True)
        process = subprocess.Popen(command, env=cluster.environment(), start_new_session=True)
        try:
            return process.wait()
        finally:
            _end(process)


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[2] != "--":
        sys.exit("usage: python tests/standalone_cluster.py FOLDER -- COMMAND...")
    sys.exit(main(sys.argv[1], sys.argv[3:]))
