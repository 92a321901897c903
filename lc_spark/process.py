"""What a driver process owes to others: to end with who started it, and to be alone at work."""

import ctypes
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lc_spark.config import Config
from lc_spark.errors import LcSparkError

PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Let Linux end this process when its parent ends: under spark-submit, the JVM.

    A scheduler that gives up on a task kills the JVM; without this the Python driver went on.
    """
    if sys.platform == "linux" and "PYSPARK_GATEWAY_PORT" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:  # it ended before
            sys.exit("The process that started this one is gone.")


@contextmanager
def only_one(config: Config) -> Iterator[None]:
    """Refuse a second run in a local workspace while the block runs.

    The kernel frees the lock when the process ends, however it ends. An object store has no such
    lock: there the scheduler must see to it, as the DAGs do (max_active_runs).
    """
    if not isinstance(config.workspace_path, Path):
        yield
        return
    config.workspace_path.mkdir(parents=True, exist_ok=True)
    with (config.workspace_path / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise LcSparkError(
                f"Another run is at work in {config.workspace} ({file.read().strip()}): wait until "
                "it has ended, or end it."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()}, day {config.day or 'all'}")
        file.flush()
        yield
