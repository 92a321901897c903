"""Airflow DAGs: the daily pipeline, one spark-submit a stage, and its weekly refit from scratch.

Imports airflow and nothing of lc_spark: Airflow lives in an environment of its own, the jobs run in
that of the project. What a deployment sets stands in SETTINGS.
"""

import datetime
import itertools
import os
from pathlib import Path
from typing import Any

from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator
from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.sdk import DAG, Connection, CronDataIntervalTimetable, Param, Variable

HERE = Path(__file__).resolve().parent

# The Airflow Variable `lc_spark`, a JSON object, replaces any of these.
SETTINGS: dict[str, Any] = {
    "home": str(HERE.parent),  # the repository: jobs run in this folder
    "environment": ".venv",  # with spark-submit and the interpreter of driver and local executors
    "connection": "lc_spark",  # id of the Airflow connection that names Spark's master
    "start_date": "2013-01-01",
    # The last day of a log that has ended, as the flights. What is triggered for a later moment is
    # then a run without tasks, and a success: such a run needs a logical date.
    "end_date": None,
    "retries": 2,
    "retry_minutes": 15,
    "timeout_minutes": 120,  # of one stage
    # The rest are defaults of the run's parameters, which its trigger form shows.
    "config": "conf/flights_daily.yaml",
    "properties_file": "conf/cluster.conf",
    "py_files": None,
    "driver_memory": "2g",
    "executor_memory": "1g",
    "executor_cores": 1,
}

STAGES = {
    "ingest": "Source rows of the day to Delta `raw`; unusable ones, and why, to `rejected`.",
    "build_features": "Delta `raw` to the field map, the vocabulary and the shards.",
    "train_lr": "Shards to LR, by Spark MLlib.",
    "train_lc": "Shards and LR to the LC models, by TorchDistributor.",
    "evaluate": "Test rows and models to the report; the best model is registered.",
    "gate": "Compares the new model with the champion on the same rows; the log has the verdict.",
    "promote": "Makes the new model the champion if the gate allows it; else it stays challenger.",
    "score": "Rows of the **next** day and the champion to Delta `scores`.",
}

# The day that ended last before a run: of its data interval, or of the moment it was triggered at.
LAST_DAY = "((dag_run.data_interval_end or dag_run.run_after) - macros.timedelta(days=1)) | ds"


def settings() -> dict[str, Any]:
    """Return SETTINGS with those of the Variable on top; an unknown key is an error."""
    given: dict[str, Any] = Variable.get("lc_spark", default={}, deserialize_json=True)
    for key in given:
        if key not in SETTINGS:
            raise ValueError(
                f"The Airflow Variable lc_spark has the unknown key '{key}'. "
                f"Known: {', '.join(SETTINGS)}"
            )
    return {**SETTINGS, **given}


def moment(date: str | None) -> datetime.datetime | None:
    """Return the midnight, UTC, at which a day begins."""
    return datetime.datetime.fromisoformat(f"{date}T00:00+00:00") if date else None


chosen = settings()
environment = Path(chosen["home"], chosen["environment"])
dates = {"start_date": moment(chosen["start_date"]), "end_date": moment(chosen["end_date"])}


def prepare(_context: Any) -> None:
    """Look for the connection, and work where the paths of the config are relative to."""
    Connection.get(chosen["connection"])  # the provider takes a missing one for YARN
    os.chdir(chosen["home"])


def stage(job: str) -> SparkSubmitOperator:
    """Return the task of one job."""
    day = f"{{{{ macros.ds_add(params.date or {LAST_DAY}, {int(job == 'score')}) }}}}"
    arguments = ["--config", "{{ params.config }}", "--date", day]
    return SparkSubmitOperator(
        task_id=job,
        doc_md=STAGES[job],
        application=f"jobs/{job}.py",
        application_args=[*arguments, "--set", "refresh.mode={{ params.refresh }}"],
        name=f"lc_spark {job} {day}",
        conn_id=chosen["connection"],
        spark_binary=str(environment / "bin" / "spark-submit"),
        env_vars={"PYSPARK_PYTHON": str(environment / "bin" / "python")},
        properties_file="{{ params.properties_file }}",
        py_files="{{ params.py_files or '' }}",
        conf={
            "spark.driver.memory": "{{ params.driver_memory }}",
            "spark.executor.memory": "{{ params.executor_memory }}",
            "spark.executor.cores": "{{ params.executor_cores }}",
            "spark.ui.showConsoleProgress": "false",  # a log is no terminal,
            "spark.log.level": "WARN",  # and should be of what the job says
        },
        pre_execute=prepare,
    )


def text(key: str, description: str) -> Param:
    """Return a parameter that is a text."""
    return Param(chosen[key], description, type="string")


with DAG(
    "lc_spark_daily",
    description="Refresh, compare and promote the click model, then score the next day",
    doc_md=str(HERE / "lc_spark_daily.md"),
    schedule=CronDataIntervalTimetable("0 0 * * *", timezone="UTC"),
    **dates,
    # Unpausing must not start months of runs: days before are named in a backfill.
    catchup=False,
    max_active_runs=1,
    tags=["lc_spark"],
    default_args={
        "retries": chosen["retries"],
        "retry_delay": datetime.timedelta(minutes=chosen["retry_minutes"]),
        "execution_timeout": datetime.timedelta(minutes=chosen["timeout_minutes"]),
    },
    params={
        "date": Param(
            None,
            "the day to run; default: that of the data interval",
            type=["null", "string"],
            format="date",
        ),
        "refresh": Param(
            "append",
            "append: go on from the day before; scratch: refit",
            enum=["append", "scratch"],
        ),
        "config": text("config", "the YAML of the data set"),
        "properties_file": text("properties_file", "settings for spark-submit"),
        "py_files": Param(
            chosen["py_files"],
            "what executors lack: dist/lc_spark.zip, for example",
            type=["null", "string"],
        ),
        "driver_memory": text("driver_memory", "of each stage's driver"),
        "executor_memory": text("executor_memory", "of each executor"),
        "executor_cores": Param(
            chosen["executor_cores"], "of each executor", type="integer", minimum=1
        ),
    },
):
    tasks = [stage(job) for job in STAGES]
    for before, after in itertools.pairwise(tasks):
        before >> after

with DAG(
    "lc_spark_weekly",
    description="Refit from scratch on Sundays, as a run of lc_spark_daily",
    doc_md=str(HERE / "lc_spark_weekly.md"),
    schedule=CronDataIntervalTimetable("0 12 * * 0", timezone="UTC"),
    **dates,
    catchup=False,
    max_active_runs=1,
    tags=["lc_spark"],
):
    TriggerDagRunOperator(
        task_id="refit_from_scratch",
        doc_md="Runs `lc_spark_daily` of Saturday with `refresh: scratch` and waits for its end.",
        trigger_dag_id="lc_spark_daily",
        trigger_run_id="weekly__{{ run_id }}",
        # By default this moment, which may lie beyond end_date; the interval is of it all the same.
        logical_date="{{ dag_run.data_interval_end or dag_run.run_after }}",
        conf={"refresh": "scratch", "date": f"{{{{ {LAST_DAY} }}}}"},
        note="Weekly refit from scratch",
        reset_dag_run=True,
        wait_for_completion=True,
        poke_interval=10,
        fail_when_dag_is_paused=True,
    )
