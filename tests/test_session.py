"""A machine that lacks something is told in one sentence; spark-submit has the same settings."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import DEFAULTS, ConfigMaker
from pyspark.sql import SparkSession

from lc_spark import session
from lc_spark.errors import LcSparkError

ROOT = Path(__file__).parent.parent


def fake_java(folder: Path, says: str) -> Path:
    """Make a JAVA_HOME whose java prints something in place of its version."""
    java = folder / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"#!/bin/sh\necho '{says}' >&2\n", encoding="utf-8")
    java.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ('openjdk version "11.0.22" 2024-01-16', 11),
        ('java version "1.8.0_292"', 8),
        ('openjdk version "16" 2021-03-16', 16),
    ],
)
def test_a_java_that_is_too_old_is_named_with_the_one_that_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, version: int
) -> None:
    home = fake_java(tmp_path, says)
    monkeypatch.setenv("JAVA_HOME", str(home))
    with pytest.raises(LcSparkError) as caught:
        session.check_java()
    message = str(caught.value)
    assert message.startswith(f"Spark 4 needs Java 17 or later, {home}/bin/java is {version}.")
    assert "openjdk-17-jre-headless" in message


@pytest.mark.parametrize("says", ['openjdk version "17.0.1"', 'openjdk version "21" 2023-09-19'])
def test_a_java_that_is_new_enough_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path, says)))
    session.check_java()


def test_a_java_that_says_no_version_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path, "hello")))
    with pytest.raises(LcSparkError, match="does not tell its version"):
        session.check_java()


def test_a_java_home_without_java_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(LcSparkError, match=f"JAVA_HOME is {tmp_path}, which has no bin/java"):
        session.check_java()
    fake_java(tmp_path, "x").joinpath("bin/java").chmod(0o644)
    with pytest.raises(LcSparkError, match="has no bin/java"):
        session.check_java()


def test_the_command_says_in_one_sentence_that_java_is_missing(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "JAVA_HOME"}
    job = [sys.executable, str(ROOT / "jobs" / "ingest.py")]
    arguments = ["--config", str(ROOT / "conf" / "flights.yaml"), "--set", f"workspace={tmp_path}"]
    ended = subprocess.run(
        [*job, *arguments],
        env={**environment, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    [error] = [line for line in ended.stderr.splitlines() if line.startswith("Error: ")]
    assert error.startswith("Error: No java was found. Install Java 17")
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_too_little_memory_is_said_with_what_would_fit() -> None:
    with pytest.raises(LcSparkError) as caught:
        session.check_memory("900000g")
    message = str(caught.value)
    assert message.startswith("spark.driver_memory is 900000g, but this machine has ")
    fitting = message.partition("set it to ")[2].partition(" ")[0]
    session.check_memory(fitting)


def test_less_memory_than_spark_starts_with_is_refused() -> None:
    with pytest.raises(LcSparkError, match=r"spark\.driver_memory is 449m, but Spark needs 450m"):
        session.check_memory("449m")
    session.check_memory("450m")


def test_spark_submit_gets_the_same_settings() -> None:
    lines = (ROOT / "conf" / "spark.conf").read_text(encoding="utf-8").splitlines()
    pairs = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert dict(pairs) == session.SETTINGS


def test_the_session_has_the_settings_and_delta(spark: SparkSession) -> None:
    for key in ("spark.sql.session.timeZone", "spark.sql.ansi.enabled", "spark.sql.extensions"):
        assert spark.conf.get(key) == session.SETTINGS[key]
    key, own = "spark.sql.shuffle.partitions", DEFAULTS["spark"]["settings"]
    assert spark.conf.get(key) == own[key] != session.SETTINGS[key], "the config's own one wins"
    assert spark.sparkContext.getConf().get("spark.driver.bindAddress") == "127.0.0.1"
    assert spark.sparkContext.pythonExec == sys.executable


def test_batches_of_very_many_fields_have_fewer_rows(
    spark: SparkSession, make_config: ConfigMaker
) -> None:
    fields: list[dict[str, Any]]
    fields = [{"name": f"f{i}", "kind": "continuous"} for i in range(2_211)]
    fields += [{"name": "tags", "kind": "multivalued", "max_values": 100}]
    at_first = spark.conf.get(session.BATCH_ROWS)
    try:
        session.start(make_config({"fields": fields}))
        assert spark.conf.get(session.BATCH_ROWS) == str(20_000_000 // 2_311)
    finally:
        spark.conf.set(session.BATCH_ROWS, str(at_first))
