"""Airflow on this machine: api-server, scheduler and dag-processor, processes of their own.

    python tests/local_airflow.py FOLDER FIRST_DAY LAST_DAY

runs the days from the first to the last through lc_spark_daily by a backfill, on the Spark master
that LC_SPARK_MASTER names (default: local[2]), and prints the states that the REST API tells.
FOLDER, which must not exist yet, becomes AIRFLOW_HOME; the workspace is FOLDER's neighbour
flights_daily. All of it listens on 127.0.0.1 alone.
"""

import contextlib
import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / ".airflow-venv" / "bin"
START_SECONDS = 180.0
ENDED = ("success", "failed")


@dataclass(frozen=True)
class Airflow:
    """An Airflow of its own home; `server` is where its api-server listens or would."""

    home: Path
    server: str
    variables: Mapping[str, str]

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `airflow ARGUMENTS`, stderr with stdout; variables come on top of the others."""
        return subprocess.run(
            [str(BIN / "airflow"), *arguments],
            env={**self.variables, **variables},
            cwd=self.home,  # not the repository: the DAGs find it themselves
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def api(self, path: str, method: str = "GET", body: Any = None) -> Any:
        """Return what the REST API answers."""
        with urllib.request.urlopen(f"{self.server}/auth/token") as answer:
            token = json.load(answer)["access_token"]
        request = urllib.request.Request(
            f"{self.server}/api/v2/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def runs(self, dag: str) -> list[dict[str, Any]]:
        """Return the runs of a DAG, the oldest day first."""
        found: list[dict[str, Any]] = self.api(f"dags/{dag}/dagRuns?order_by=run_after")["dag_runs"]
        return found

    def tasks(self, dag: str, run_id: str) -> list[dict[str, Any]]:
        """Return the task instances of a run, in the order in which they began."""
        answer = self.api(f"dags/{dag}/dagRuns/{urllib.parse.quote(run_id)}/taskInstances")
        found: list[dict[str, Any]] = answer["task_instances"]
        return sorted(found, key=lambda task: task["start_date"] or "~")

    def task_log(self, dag: str, run_id: str, task: str) -> str:
        """Return the log of a task's first try."""
        path = f"dags/{dag}/dagRuns/{urllib.parse.quote(run_id)}/taskInstances/{task}/logs/1"
        lines = self.api(f"{path}?full_content=true")["content"]
        return "\n".join(line["event"] for line in lines)

    def backfill(self, dag: str, first: str, last: str, seconds: float) -> list[dict[str, Any]]:
        """Run the days from first to last, one after the other; return their runs, all ended.

        A day that had a run before is left out, as Airflow does.
        """
        arguments = ("--dag-id", dag, "--from-date", first, "--to-date", last)
        made = self.run("backfill", "create", *arguments, "--max-active-runs", "1")
        if made.returncode != 0:
            raise RuntimeError(made.stdout[-2000:])
        self.api(f"dags/{dag}", "PATCH", {"is_paused": False})
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = [run for run in self.runs(dag) if run["run_type"] == "backfill"]
            if not found:
                raise RuntimeError(f"Airflow made no run of {dag}: {made.stdout[-2000:]}")
            if all(run["state"] in ENDED for run in found):
                return found
            time.sleep(2)
        states = [(run["dag_run_id"], run["state"]) for run in found]
        raise TimeoutError(f"{dag} after {seconds:.0f} s: {states}")


def new_airflow(home: Path, master: str, settings: Mapping[str, Any]) -> Airflow:
    """Make an Airflow home with its database; settings are the Variable lc_spark."""
    home.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = f"http://127.0.0.1:{port}"
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "PYSPARK_"))}
    airflow = Airflow(
        home,
        server,
        {
            **inherited,
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "airflow_dags"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__PARALLELISM": "2",
            # Everyone on this machine may do everything: a home of tests and demos.
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{server}/execution/",
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": str(port),
            "AIRFLOW__API__BASE_URL": server,
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
            "AIRFLOW_CONN_LC_SPARK": connection(master),
            "AIRFLOW_VAR_LC_SPARK": json.dumps(settings),
            "SPARK_LOCAL_IP": "127.0.0.1",
        },
    )
    made = airflow.run("db", "migrate")
    if made.returncode != 0:
        raise RuntimeError(f"airflow db migrate: {made.stdout[-2000:]}")
    return airflow


def connection(master: str) -> str:
    """Return the Airflow connection of a Spark master: a URI loses the brackets of local[2]."""
    return json.dumps({"conn_type": "spark", "host": master})


@contextlib.contextmanager
def running(airflow: Airflow) -> Iterator[None]:
    """Run api-server, scheduler and dag-processor, logs in the home; end them and their tasks."""
    commands = (("api-server",), ("scheduler", "--skip-serve-logs"), ("dag-processor",))
    with contextlib.ExitStack() as stack:
        for command in commands:
            stack.enter_context(_process(airflow, *command))
        _wait_until_up(airflow)
        yield


@contextlib.contextmanager
def _process(airflow: Airflow, *command: str) -> Iterator[None]:
    with (airflow.home / f"{command[0]}.log").open("wb") as log:
        process = subprocess.Popen(
            [str(BIN / "airflow"), *command],
            env=dict(airflow.variables),
            cwd=airflow.home,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield
    finally:
        if process.poll() is None:
            started = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs([*started, psutil.Process(process.pid)], timeout=15)
            for one in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        process.wait()


def _wait_until_up(airflow: Airflow) -> None:
    """Wait until the server answers, the scheduler works and the DAGs have been read."""
    end = time.monotonic() + START_SECONDS
    said = ""
    while time.monotonic() < end:
        try:
            health = airflow.api("monitor/health")
            dags = airflow.api("dags")["total_entries"]
        except (urllib.error.URLError, ConnectionError) as error:
            said = str(error)
        else:
            said = f"scheduler {health['scheduler']['status']}, {dags} DAGs"
            if health["scheduler"]["status"] == "healthy" and dags == 2:
                return
        time.sleep(1)
    raise TimeoutError(
        f"Airflow is not up after {START_SECONDS:.0f} s ({said}): see {airflow.home}"
    )


def states_table(airflow: Airflow, dag: str) -> str:
    """Return a line a run of a DAG: its day, its state, that of each task and the seconds."""
    lines = []
    for run in airflow.runs(dag):
        tasks = airflow.tasks(dag, run["dag_run_id"])
        took = ", ".join(f"{t['task_id']} {t['state']} {t['duration'] or 0:.0f} s" for t in tasks)
        day = run["conf"].get("date") or run["data_interval_start"][:10]
        lines.append(f"{day}  {run['state']:8} {took}")
    return "\n".join(lines)


def main(home: Path, first: str, last: str) -> int:
    """Run days through lc_spark_daily by a backfill and print the states."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    days = (datetime.date.fromisoformat(last) - datetime.date.fromisoformat(first)).days + 1
    home = home.resolve()
    home.mkdir(parents=True)
    config = yaml.safe_load((ROOT / "conf" / "flights_daily.yaml").read_text(encoding="utf-8"))
    config["workspace"] = str(home.with_name("flights_daily"))
    path = home / "flights_daily.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    airflow = new_airflow(
        home,
        os.environ.get("LC_SPARK_MASTER", "local[2]"),
        {"config": str(path), "retries": 0, "end_date": last},
    )
    with running(airflow):
        print(f"Airflow     {airflow.server}; logs in {home}", flush=True)
        runs = airflow.backfill("lc_spark_daily", first, last, days * 1800)
        print(states_table(airflow, "lc_spark_daily"))
    return int(len(runs) != days or any(run["state"] != "success" for run in runs))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python tests/local_airflow.py FOLDER FIRST_DAY LAST_DAY")
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
