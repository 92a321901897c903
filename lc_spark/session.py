"""Makes the SparkSession with Delta, after checking what a new machine may lack."""

import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pyspark import SparkConf, SparkContext
from pyspark.errors import PySparkRuntimeError
from pyspark.sql import SparkSession

from lc_spark import failures
from lc_spark.config import Config, Spark
from lc_spark.errors import LcSparkError
from lc_spark.field_kinds import Multivalued

OLDEST_JAVA = 17
LEAST_MEMORY = 450  # MiB of heap, below which Spark does not start

# A batch on its way to a Python worker: of thousands of fields, 65,536 rows would be a gigabyte.
BATCH_ROWS = "spark.sql.execution.arrow.maxRecordsPerBatch"
MOST_CELLS, LEAST_ROWS = 20_000_000, 1024
# conf/spark.conf gives spark-submit the same; a test holds them together.
SETTINGS = {
    "spark.jars.packages": "io.delta:delta-spark_2.13:4.0.1",
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    # A row that an expression cannot take must become null and be counted, not end the job.
    "spark.sql.ansi.enabled": "false",
    "spark.sql.session.timeZone": "UTC",
    BATCH_ROWS: "65536",
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    "spark.sql.parquet.compression.codec": "zstd",
    # Columns of many values give their dictionary up soon: writing them took half the time with
    # this as with the default of 1 MB, for files a fifth larger.
    "spark.hadoop.parquet.dictionary.page.size": "16384",
    "spark.sql.shuffle.partitions": "16",
    "spark.databricks.delta.snapshotPartitions": "2",
    # Tables are read whole or by partition: no use for the range of each column in each file.
    "spark.databricks.delta.properties.defaults.dataSkippingNumIndexedCols": "0",
    # Spark waits for ever where the thread that ran out of memory was one of its schedulers'.
    "spark.driver.defaultJavaOptions": "-XX:+ExitOnOutOfMemoryError",
    # Each task of LR returns a gradient of d doubles.
    "spark.driver.maxResultSize": "0",
    "spark.ui.showConsoleProgress": "true",
}
# Spark's classes that log a task's failure with its stack trace on the way to the driver.
REPEATING = (
    "executor.Executor",
    "util.Utils",
    "sql.delta.files.DeltaFileFormatWriter",
    "sql.execution.datasources.FileFormatWriter",
)


def start(config: Config) -> SparkSession:
    """Return the session of a config: as ``start_for`` does, a local one with a core a rank."""
    spark = start_for(config.name, config.spark, config.most_ranks)
    if spark.conf.get(BATCH_ROWS) == SETTINGS[BATCH_ROWS]:  # and nobody's own choice
        width = sum(f.max_values if isinstance(f, Multivalued) else 1 for f in config.fields)
        rows = min(int(SETTINGS[BATCH_ROWS]), MOST_CELLS // width)
        spark.conf.set(BATCH_ROWS, max(rows, LEAST_ROWS))
    return spark


def start_for(name: str, settings: Spark, ranks: int = 1) -> SparkSession:
    """Return the session: spark-submit's if there is one, else a local one with SETTINGS.

    Raises LcSparkError when Java or memory is missing, or Spark cannot start.
    """
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
    check_java()
    if "PYSPARK_GATEWAY_PORT" in os.environ:
        # Under spark-submit: a SparkConf made before its JVM is reached has none of its settings.
        SparkContext.getSystemProperty("spark.master")
    conf = SparkConf()
    if not conf.contains("spark.master"):
        check_memory(settings.driver_memory)
        conf.setMaster(settings.master or f"local[{max(os.cpu_count() or 1, ranks)}]")
        conf.set("spark.driver.memory", settings.driver_memory)
        # Loopback: nothing of a local run is reachable from outside.
        conf.set("spark.driver.bindAddress", "127.0.0.1").set("spark.driver.host", "127.0.0.1")
    for key, value in {**SETTINGS, **settings.settings}.items():
        conf.setIfMissing(key, value)
    builder = SparkSession.builder.config(conf=conf).appName(f"lc_spark {name}")
    try:
        with failures.in_words(dict(conf.getAll()), "The start of Spark", None):
            spark = builder.getOrCreate()
    except PySparkRuntimeError as error:
        raise LcSparkError(
            "Spark did not start (its own words stand above). The usual cause is that "
            f"{SETTINGS['spark.jars.packages']} could not be fetched from Maven Central: check "
            "the network, or give the three Delta jars by spark.settings in the config "
            "('spark.jars': paths, 'spark.jars.packages': '')."
        ) from error
    spark.sparkContext.setLogLevel("ERROR")
    _quieten(spark)
    logging.getLogger("py4j").setLevel(logging.CRITICAL)  # what it logs it raises as well
    # It writes a page of JSON before each error that ends in one of our sentences.
    logging.getLogger("SQLQueryContextLogger").setLevel(logging.CRITICAL)
    return spark


def _quieten(spark: SparkSession) -> None:
    """Take the stack traces of failed tasks out of the log: the error itself brings them."""
    assert spark._jvm is not None, "a session is active"
    log4j = spark._jvm.org.apache.logging.log4j
    for name in REPEATING:
        log4j.core.config.Configurator.setLevel(f"org.apache.spark.{name}", log4j.Level.OFF)


def check_java() -> None:
    """Raise LcSparkError unless a Java that Spark 4 runs on is found."""
    home = os.environ.get("JAVA_HOME")
    java = shutil.which(str(Path(home) / "bin" / "java") if home else "java")
    advice = f"Install Java {OLDEST_JAVA} (Debian: openjdk-17-jre-headless) or set JAVA_HOME to it."
    if java is None:
        found = f"JAVA_HOME is {home}, which has no bin/java" if home else "No java was found"
        raise LcSparkError(f"{found}. {advice}")
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    match = re.search(r'version "(\d+)(?:\.(\d+))?', said)
    if match is None:
        raise LcSparkError(f"{java} does not tell its version. {advice}")
    version = int(match[2]) if match[1] == "1" and match[2] else int(match[1])
    if version < OLDEST_JAVA:
        raise LcSparkError(
            f"Spark 4 needs Java {OLDEST_JAVA} or later, {java} is {version}. {advice}"
        )


def check_memory(driver_memory: str) -> None:
    """Raise LcSparkError when the driver is to take more memory than there is, or too little."""
    wanted = int(driver_memory[:-1]) * (1024 if driver_memory[-1] == "g" else 1)
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    if wanted < LEAST_MEMORY:
        raise LcSparkError(
            f"spark.driver_memory is {driver_memory}, but Spark needs {LEAST_MEMORY}m to start: "
            "set it to 1g or more (--set spark.driver_memory=...)."
        )
    if wanted > present * 0.9:
        raise LcSparkError(
            f"spark.driver_memory is {driver_memory}, but this machine has {present} MiB: set it "
            f"to {int(present * 0.6)}m or less (--set spark.driver_memory=...)."
        )


def heap_and_tasks(spark: SparkSession) -> tuple[int, int]:
    """Return the bytes that the driver's Java may take, and how many tasks run in it at a time."""
    context = spark.sparkContext
    assert context._jvm is not None, "a session is active"
    heap = int(context._jvm.java.lang.Runtime.getRuntime().maxMemory())
    return heap, context.defaultParallelism if str(context.master).startswith("local") else 0
