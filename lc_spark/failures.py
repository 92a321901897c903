"""Turns what Spark, MLflow or a rank say of a full disk, spent memory or a damaged file into words.

Such failures come as the stack traces of several layers, and only their words tell them apart.
What is none of these few is left as it came.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psutil
from py4j.protocol import Py4JNetworkError
from pyspark.sql import SparkSession

from lc_spark.errors import LcSparkError
from lc_spark.files import AnyPath

NO_SPACE = r"No space left on device|database or disk is full|Disk quota exceeded"
WRITING_TO = r"writing rows to (\S+?)\.? SQLSTATE"
# Of a part file that Python writes, in a task whose stack trace may name the classes below.
WRITING_PART = r"No space left on device, while writing (\S+) \."
# Of Spark's classes that write to spark.local.dir.
SPILLING = r"DiskBlockObjectWriter|ShuffleWriter|SpillWriter|DiskStore|IndexShuffleBlockResolver"
JAVA_MEMORY = r"java\.lang\.OutOfMemoryError|SparkOutOfMemoryError"
JAVA_GONE = "Py4JNetworkError"
TOO_MUCH_COLLECTED = r"is bigger than (?:local )?(?:spark\.driver\.)?maxResultSize"
KILLED = (
    r"Python worker exited unexpectedly|MemoryError\b|ExecutorLostFailure|"
    r"Signal 9 \(SIGKILL\) received|\b(?:exit ?code|return code)\s*:?\s*(?:137|-9)\b"
)
DAMAGED = r"\[FAILED_READ_FILE[.\w]*\][^\n]*?([a-z0-9]+:/\S+?)\.?(?:\s|$)"

Settings = Mapping[str, str]


def told(
    spark: SparkSession, doing: str, workspace: AnyPath | None
) -> AbstractContextManager[None]:
    """Return a block as in_words, with the settings of a session that answers still."""
    settings = dict(spark.sparkContext.getConf().getAll())
    settings["spark.master"] = str(spark.sparkContext.master)
    return in_words(settings, doing, workspace)


@contextmanager
def in_words(settings: Settings, doing: str, workspace: AnyPath | None) -> Iterator[None]:
    """Let a failure of the machine in the block end in one sentence; doing names the block.

    Raises LcSparkError for a full disk, spent memory and a file that Spark cannot read; an
    LcSparkError that tells of one gets what to do.
    """
    try:
        yield
    except BaseException as error:
        known = isinstance(error, Exception)  # and not Ctrl-C
        advice = _advice(_words(error), settings, workspace) if known else None
        if advice is None:
            raise
        what = str(error) if isinstance(error, LcSparkError) else f"{doing} ended early."
        raise LcSparkError(f"{what} {advice}") from error


def _words(error: BaseException) -> str:
    """Return what an error and those that led to it say, stack traces of Java's included."""
    said = []
    at: BaseException | None = error
    while at is not None:
        try:
            said.append(f"{type(at).__name__}: {at}\n{getattr(at, '_stackTrace', '')}")
        except Py4JNetworkError:  # an error of Java's whose JVM is gone
            said.append(JAVA_GONE)
        # A sentence of ours names what it was made of; what happened before does not matter.
        at = at.__cause__ or (None if isinstance(at, LcSparkError) else at.__context__)
    return "\n".join(said)


def _advice(words: str, settings: Settings, workspace: AnyPath | None) -> str | None:
    """Return what was wrong, where, and what to do, or None for what is not known here."""
    if re.search(NO_SPACE, words):
        return _full_disk(words, settings, workspace)
    if re.search(TOO_MUCH_COLLECTED, words):
        limit = settings.get("spark.driver.maxResultSize", "1g")
        return (
            f"The tasks sent the driver more than spark.driver.maxResultSize ({limit}): raise it "
            f"(spark.settings in the config) and, with it, {_driver_memory(settings)}."
        )
    if re.search(JAVA_MEMORY, words):
        return (
            f"Java had too little memory: raise {_driver_memory(settings)}{_executors(settings)}, "
            "or make fewer features (min_count, hashed)."
        )
    if JAVA_GONE in words:
        return (
            "Spark's Java process is gone, as a rule for want of memory: raise "
            f"{_driver_memory(settings)}, or lower it where it comes near the {_machine_memory()} "
            "that this machine has."
        )
    if re.search(KILLED, words):
        return _killed(settings)
    damaged = re.search(DAMAGED, words)
    if damaged:
        return (
            f"Spark cannot read {damaged[1]}: it is damaged, or its columns are not of the types "
            "that the other files have. Write it again, or take it out of the folder."
        )
    return None


def _machine_memory() -> str:
    return f"{psutil.virtual_memory().total / 1e9:,.1f} GB"


def _full_disk(words: str, settings: Settings, workspace: AnyPath | None) -> str:
    spills = os.environ.get("SPARK_LOCAL_DIRS") or settings.get("spark.local.dir", "")
    spills = spills or tempfile.gettempdir()
    folders = {f"spark.local.dir {folder}": Path(folder) for folder in spills.split(",")}
    if isinstance(workspace, Path):
        folders[f"the workspace {workspace}"] = workspace
    present = [
        (name, shutil.disk_usage(folder)) for name, folder in folders.items() if folder.exists()
    ]
    part, to = re.search(WRITING_PART, words), re.search(WRITING_TO, words)
    if part:
        full = part[1]
    elif re.search(SPILLING, words):
        full = f"spark.local.dir {spills}"
    elif to:
        full = to[1]
    else:
        full = min(present, key=lambda pair: pair[1].free, default=("the workspace",))[0]
    free = ", ".join(
        f"{name} {use.free / 1e9:,.2f} of {use.total / 1e9:,.2f} GB" for name, use in present
    )
    return (
        f"No space is left on the disk of {full}. Free on this machine now: {free}. Make room "
        "there, or name a larger disk (workspace in the config; spark.local.dir under "
        "spark.settings, SPARK_LOCAL_DIRS on a cluster), and give the same command again."
    )


def _driver_memory(settings: Settings) -> str:
    return (
        f"spark.driver_memory, which is {settings.get('spark.driver.memory', '1g')} (--set "
        "spark.driver_memory=..., or --driver-memory of spark-submit)"
    )


def _on_cluster(settings: Settings) -> bool:
    return not settings["spark.master"].startswith("local")


def _executors(settings: Settings) -> str:
    memory = settings.get("spark.executor.memory", "1g")
    return f" or, of an executor, spark.executor.memory ({memory})" if _on_cluster(settings) else ""


def _killed(settings: Settings) -> str:
    """Say what to do when Linux or a scheduler has killed a process, as a rule for its memory."""
    if _on_cluster(settings):
        overhead = settings.get("spark.executor.memoryOverhead", "not set: a tenth of the memory")
        return (
            "A process of an executor was killed, as a rule because its memory was spent: raise "
            f"spark.executor.memoryOverhead ({overhead}), of which Python lives, or lower "
            "spark.executor.cores."
        )
    return (
        "A Python process was killed, as a rule because this machine's memory was spent: of its "
        f"{_machine_memory()} Java may take spark.driver_memory, which is "
        f"{settings.get('spark.driver.memory', '1g')}. Lower that, or run fewer tasks at a time "
        "(spark.master=local[1])."
    )
