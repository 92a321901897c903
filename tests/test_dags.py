"""The DAGs in a real Airflow, with real jobs on some of the flights: good days and bad ones.

Good: a task on a standalone cluster, Saturday from scratch by the weekly DAG, and Monday, while
Sunday is missing and the gate says no, by a backfill. All stages on a cluster: tests/test_cluster.
"""

import contextlib
import datetime
import fcntl
import json
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from local_airflow import BIN, Airflow, connection, new_airflow, running
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from standalone_cluster import Cluster, standalone_cluster

from lc_spark import config_file, datasets, registry, tables
from lc_spark.config import Config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parent.parent
ROWS = 300  # of a day
BACKFILL_SECONDS = 1500.0  # at the most; on two busy cores a job takes more than a minute
SATURDAY, SUNDAY, MONDAY = (datetime.date(2013, 2, day) for day in (2, 3, 4))
LATER = datetime.date(2013, 2, 20)
ONE_DAY = datetime.timedelta(days=1)
JOBS = [
    "ingest",
    "build_features",
    "train_lr",
    "train_lc",
    "evaluate",
    "gate",
    "promote",
    "score",
]
LOCAL = {"AIRFLOW_CONN_LC_SPARK": connection("local[2]")}

# What a DagBag says, on its last line, of the file and of what importing it brought in.
LOOK = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
bag = DagBag(sys.argv[1])
try:
    bag.dags["lc_spark_daily"].task_dict["ingest"]._pre_execute_hook({})
except Exception as error:
    without_connection = str(error)
print(json.dumps({
    "errors": bag.import_errors,
    "chains": {name: [t.task_id for t in dag.topological_sort()] for name, dag in bag.dags.items()},
    "ours": [name for name in sys.modules if name.partition(".")[0] == "lc_spark"],
    "without_connection": without_connection,
}))
"""


@dataclass(frozen=True)
class Made:
    """What the tests share: an Airflow on a cluster, and the config that its tasks use."""

    airflow: Airflow
    cluster: Cluster
    config: Config
    config_path: Path

    def run_day(self, day: datetime.date, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a day as `airflow dags test` does: the last day that is whole at a moment."""
        return self.airflow.run("dags", "test", "lc_spark_daily", str(day + ONE_DAY), **variables)


def jobs_begun(output: str) -> list[str]:
    return re.findall(r"Spark-Submit cmd: .* jobs/(\w+)\.py --config", output)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dags")


@pytest.fixture(scope="module")
def config_path(folder: Path) -> Path:
    """A config of three fields and a file a day, with some of its flights."""
    columns = ["date", "carrier", "flight", "origin", "dest", "hour", "sched_dep_time"]
    flights = datasets.flights()[[*columns, "dep_time", "arr_delay"]]
    (folder / "source").mkdir()
    for day in (SATURDAY - ONE_DAY, SATURDAY, SUNDAY, MONDAY, MONDAY + ONE_DAY):
        rows = flights[flights["date"] == day].head(ROWS)
        rows.to_parquet(folder / "source" / f"{day}.parquet", index=False)
    settings = yaml.safe_load((ROOT / "conf" / "flights_daily.yaml").read_text())
    settings |= {"workspace": str(folder / "workspace"), "name": "tiny"}
    settings["source"] |= {"dataset": None, "path": str(folder / "source" / "{date}.parquet")}
    settings["fields"] = [
        {"name": name, "kind": "categorical"} for name in ("carrier", "origin", "hour")
    ]
    settings["split"] |= {"days": 2, "valid": 0.2, "test": 0.2}
    settings["lr"] = {"max_iterations": 5, "l2": 0.01}
    settings["training"] |= {"ranks": 1, "epochs": 1, "hidden": [4]}
    # Of so few rows any model may be champion.
    settings["gate"] = {"auc": 0.9, "logloss": 0.9, "calibration": 0.9}
    settings["gate"] |= {"min_rows": 10, "min_positives": 2}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def made(folder: Path, config_path: Path) -> Iterator[Made]:
    """An Airflow on a cluster, without its server, whose Variable names the tiny config."""
    properties = folder / "tiny.conf"
    properties.write_text(
        (ROOT / "conf" / "cluster.conf").read_text()
        # The jobs are tiny: what costs is the start of each, so one executor, little compiled.
        + "spark.cores.max 1\n"
        + "spark.sql.codegen.wholeStage false\n"
        + "spark.sql.codegen.factoryMode NO_CODEGEN\n"
        + "spark.ui.enabled false\n"
        + "spark.sql.shuffle.partitions 2\n"
        + "spark.databricks.delta.snapshotPartitions 1\n"
        + "spark.driver.extraJavaOptions -XX:TieredStopAtLevel=1\n"
        + "spark.executor.extraJavaOptions -XX:TieredStopAtLevel=1\n"
        + f"spark.executorEnv.PYTHONPATH {ROOT}\n"
    )
    settings = {
        "config": str(config_path),
        "properties_file": str(properties),
        "driver_memory": "1g",
        "retries": 0,
        "end_date": "2013-12-30",  # unpaused, the DAGs must not run for today
    }
    with standalone_cluster(folder / "cluster") as cluster:
        airflow = new_airflow(folder / "airflow", cluster.master, settings)
        yield Made(airflow, cluster, config_file.load(config_path), config_path)


@pytest.fixture(scope="module")
def ingested(made: Made, spark: SparkSession) -> dict[datetime.date, int]:
    """Rows of each day of `raw` after a task of Saturday's on the cluster."""
    done = made.airflow.run("tasks", "test", "lc_spark_daily", "ingest", str(SATURDAY + ONE_DAY))
    assert done.returncode == 0, done.stdout[-6000:]
    assert jobs_begun(done.stdout) == ["ingest"]
    return rows_by_day(spark, made, "raw")


@contextlib.contextmanager
def serving(made: Made) -> Iterator[Airflow]:
    """The same Airflow with its processes; the daily DAG may run. Its jobs need no cluster:
    there each of them would start an executor, which takes as long as its work.
    """
    airflow = replace(made.airflow, variables={**made.airflow.variables, **LOCAL})
    with running(airflow):
        airflow.api("dags/lc_spark_daily", "PATCH", {"is_paused": False})
        yield airflow


@dataclass(frozen=True)
class Refit:
    """What Airflow tells of Saturday's run by the weekly DAG."""

    day: dict[str, Any]
    tasks: list[tuple[str, str]]  # id, state
    logs: dict[str, str]  # by task


@pytest.fixture(scope="module")
def saturday(made: Made, ingested: dict[datetime.date, int]) -> Refit:
    """Saturday, run from scratch by the weekly DAG; Airflow's server has ended again."""
    assert ingested
    with serving(made) as server:
        first = str(SATURDAY - 6 * ONE_DAY)
        (week,) = server.backfill("lc_spark_weekly", first, str(SATURDAY), BACKFILL_SECONDS)
        (day,) = server.runs("lc_spark_daily")[-1:]
        tasks = [
            (t["task_id"], t["state"]) for t in server.tasks("lc_spark_daily", day["dag_run_id"])
        ]
        logs = {
            task: server.task_log("lc_spark_daily", day["dag_run_id"], task)
            for task, state in tasks
            if state in ("success", "failed")
        }
    assert week["state"] == "success", [log[-3000:] for log in logs.values()][-1:]
    return Refit(day, tasks, logs)


@pytest.fixture
def server(made: Made, saturday: Refit) -> Iterator[Airflow]:
    """The Airflow with its processes, after Saturday."""
    assert saturday
    with serving(made) as airflow:
        yield airflow


def rows_by_day(
    spark: SparkSession, made: Made, table: tables.TableName
) -> dict[datetime.date, int]:
    rows = tables.read(spark, made.config, table).groupBy("date").count().collect()
    return {row["date"]: row["count"] for row in rows}


def state(spark: SparkSession, made: Made) -> dict[str, Any]:
    """What a failed day must leave as it is: the champion, and the rows of every day."""
    champion = registry.with_alias(made.config, registry.CHAMPION)
    assert champion is not None
    rows = {table: rows_by_day(spark, made, table) for table in ("raw", "scores")}
    return {"champion": champion.version, **rows}


def test_the_dags_import_airflow_alone_and_a_missing_connection_is_named(made: Made) -> None:
    variables = {
        k: v for k, v in made.airflow.variables.items() if not k.startswith("AIRFLOW_CONN")
    }
    done = subprocess.run(
        [str(BIN / "python"), "-c", LOOK, str(ROOT / "airflow_dags")],
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["errors"] == {}
    assert found["chains"] == {"lc_spark_daily": JOBS, "lc_spark_weekly": ["refit_from_scratch"]}
    assert found["ours"] == []
    assert "`lc_spark` isn't defined" in found["without_connection"]


def test_a_task_runs_on_the_cluster(ingested: dict[datetime.date, int], made: Made) -> None:
    executors = list(made.cluster.folder.glob("worker-*/app-*/*/stderr"))
    assert any("Running task" in path.read_text() for path in executors)
    assert set(ingested) == {SATURDAY - ONE_DAY, SATURDAY}


def test_the_weekly_refit_runs_every_job_of_its_day_from_scratch(
    saturday: Refit, ingested: dict[datetime.date, int], made: Made, spark: SparkSession
) -> None:
    assert saturday.tasks == [(job, "success") for job in JOBS]
    assert saturday.day["dag_run_id"].startswith("weekly__")
    assert saturday.day["conf"] == {"refresh": "scratch", "date": str(SATURDAY)}
    log = saturday.logs["build_features"]
    assert f"--date {SATURDAY} --set refresh.mode=scratch" in log
    found = state(spark, made)
    assert set(found["scores"]) == {SUNDAY}
    assert found["raw"] == ingested  # a day ingested twice has its rows once


def test_each_log_has_the_address_of_the_mlflow_run(saturday: Refit) -> None:
    for job in JOBS:
        addresses = re.findall(
            r"started; MLflow run +(\S+ in sqlite:\S+|http\S+)", saturday.logs[job]
        )
        assert len(addresses) == 1, job


def test_a_day_of_a_broken_file_ends_at_ingest(
    saturday: Refit, made: Made, spark: SparkSession
) -> None:
    assert saturday
    before = state(spark, made)
    path = Path(str(made.config.source.path).format(date=LATER))
    path.write_bytes(b"PAR1, and then the disk was full")
    done = made.run_day(LATER, **LOCAL)
    path.unlink()
    assert done.returncode != 0
    assert jobs_begun(done.stdout) == ["ingest"]
    assert "cannot read" in done.stdout
    assert state(spark, made) == before


def test_a_run_beside_another_one_is_refused(saturday: Refit, made: Made) -> None:
    assert saturday
    with Path(made.config.workspace, "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = made.run_day(MONDAY, **LOCAL)
    assert done.returncode != 0
    assert jobs_begun(done.stdout) == ["ingest"]
    assert "Another run is at work" in done.stdout


def test_the_driver_of_a_task_that_takes_too_long_dies_with_it(
    made: Made, folder: Path, config_path: Path
) -> None:
    settings = yaml.safe_load(config_path.read_text())
    settings["workspace"] = str(folder / "slow")
    settings["source"]["reject"] = {
        "slow": "reflect('java.lang.Thread', 'sleep', bigint(600000)) = 'awake'"
    }
    slow = folder / "slow.yaml"
    slow.write_text(yaml.safe_dump(settings))
    variable = json.loads(made.airflow.variables["AIRFLOW_VAR_LC_SPARK"])
    variable |= {"config": str(slow), "timeout_minutes": 0.75}
    # Its run is that of the moment a day later, for which no backfill could then make one.
    day, changed = MONDAY + ONE_DAY, {**LOCAL, "AIRFLOW_VAR_LC_SPARK": json.dumps(variable)}
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(made.run_day, day, **changed)
        seen = set[str]()
        while not run.done():
            seen |= set(working_on(slow))
            time.sleep(0.5)
    assert {"java", "python"} <= seen
    assert run.result().returncode != 0
    assert "AirflowTaskTimeout" in run.result().stdout
    end = time.monotonic() + 30
    while working_on(slow) and time.monotonic() < end:
        time.sleep(0.5)
    assert working_on(slow) == []


def working_on(config: Path) -> list[str]:
    """Return the programs ('java', 'python') of the processes whose command line names a config."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if str(config) in command:
            # Not by exe, which psutil keeps: spark-submit is a shell that becomes Java.
            found.append(Path(command[0]).name.rstrip("0123456789."))
    return found


def test_a_backfilled_day_goes_on_without_yesterday_and_the_gate_may_stop_it(
    server: Airflow, made: Made, spark: SparkSession
) -> None:
    before = state(spark, made)
    settings = yaml.safe_load(made.config_path.read_text())
    settings["gate"]["min_rows"] = 100_000
    made.config_path.write_text(yaml.safe_dump(settings, sort_keys=False))
    (backfilled,) = server.backfill("lc_spark_daily", str(MONDAY), str(MONDAY), BACKFILL_SECONDS)
    tasks = server.tasks("lc_spark_daily", backfilled["dag_run_id"])
    assert [(t["task_id"], t["state"]) for t in tasks] == [(job, "success") for job in JOBS]
    log = server.task_log("lc_spark_daily", backfilled["dag_run_id"], "ingest")
    assert f"'raw' has no rows of {SUNDAY}" in log
    features = made.config.for_day(MONDAY).run_path / "stages" / "features.json"
    assert json.loads(features.read_text())["parent"]["day"] == str(SATURDAY)
    for job in ("gate", "promote"):
        log = server.task_log("lc_spark_daily", backfilled["dag_run_id"], job)
        assert "stays challenger" in log
        assert "gate.min_rows is 100,000" in log
    after = state(spark, made)
    assert after["champion"] == before["champion"]
    assert set(after["scores"]) == {SUNDAY, MONDAY + ONE_DAY}
    scores_df = tables.read(spark, made.config, "scores").where(F.col("date") > F.lit(MONDAY))
    assert [row["model"] for row in scores_df.select("model").distinct().collect()] == [
        f"models:/{made.config.model_name}/{before['champion']}"
    ]
