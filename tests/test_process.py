"""A driver is alone in its workspace, and ends with whoever started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ConfigMaker

from lc_spark import process
from lc_spark.errors import LcSparkError

HOLDER = """
import sys, time
from lc_spark import process
from lc_spark.config import Config
with process.only_one(Config.model_validate_json(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
CHILD = """
import time
from lc_spark import process
process.end_with_parent()
print("ready", flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=sys.stdout)
print(child.pid, flush=True)
child.wait()
"""


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", *arguments]
    environment = {**os.environ, **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def line_of(started: subprocess.Popen[str]) -> str:
    assert started.stdout is not None
    return started.stdout.readline().strip()


def test_a_second_run_is_refused_until_the_first_has_ended(make_config: ConfigMaker) -> None:
    config = make_config()
    holder = start(HOLDER, config.model_dump_json())
    try:
        assert line_of(holder) == "held"
        with pytest.raises(LcSparkError) as caught, process.only_one(config):
            pytest.fail("two at once")
        assert f"(process {holder.pid}, day all)" in str(caught.value)
    finally:
        holder.kill()
        holder.wait()
    with process.only_one(config):  # killed, it left no lock behind
        assert (Path(config.workspace) / "lock").read_text().startswith(f"process {os.getpid()}")
    with process.only_one(config):
        pass


def is_running(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux")
@pytest.mark.parametrize(("under_spark", "left"), [("1", False), ("", True)])
def test_under_spark_submit_a_driver_ends_with_the_jvm(under_spark: str, left: bool) -> None:
    gateway = {"PYSPARK_GATEWAY_PORT": under_spark} if under_spark else {}
    parent = start(PARENT, CHILD, **gateway)
    pid = int(line_of(parent))
    try:
        assert line_of(parent) == "ready"
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 30
        while is_running(pid) and not left and time.monotonic() < deadline:
            time.sleep(0.05)
        assert is_running(pid) == left
    finally:
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)
