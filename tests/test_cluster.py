"""All stages by spark-submit on a cluster of processes, with the library as a zip; what is killed.

The interpreter has all packages but not lc_spark: it comes to driver, executors and ranks by
--py-files alone.
"""

import datetime
import hashlib
import json
import os
import re
import signal
import subprocess
import sysconfig
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3fs
import yaml
from moto.server import ThreadedMotoServer
from standalone_cluster import SPARK_HOME, Cluster, standalone_cluster

from lc_spark import datasets, session

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

ROOT = Path(__file__).parent.parent
# Small plans, run once: see tests/conftest.py.
QUICK = {
    "spark.sql.shuffle.partitions": "2",
    "spark.databricks.delta.snapshotPartitions": "1",
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1",
    "spark.executor.extraJavaOptions": "-XX:TieredStopAtLevel=1",
    "spark.eventLog.enabled": "true",
    "spark.eventLog.compress": "false",
    "spark.eventLog.rolling.enabled": "false",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
}
ENDS_WITHIN = 60.0  # seconds from the death of a rank to the end of its job
# All stages under one driver: tests/test_dags.py has them as jobs of their own, on a cluster too.
RUN_ALL = """
import logging
import sys
from pathlib import Path
from lc_spark import config_file, pipeline, session

logging.basicConfig()
logging.getLogger("lc_spark").setLevel(logging.INFO)
config = config_file.load(Path(sys.argv[1]), None)
spark = session.start(config)
for stage in (*pipeline.RUN_STAGES, "score"):
    pipeline.run_stage(stage, spark, config)
"""
PLACE = re.compile(r"rank (\d) of 2: host \S+, process (\d+), (\S+)")


class Submitter:
    """Runs scripts by spark-submit on a cluster and keeps what each wrote."""

    def __init__(self, cluster: Cluster, python: Path, library: Path, folder: Path) -> None:
        self.cluster, self.python, self.library, self.folder = cluster, python, library, folder
        kept = {k: v for k, v in cluster.environment().items() if k != "PYTHONPATH"}
        self.environment = {**kept, "PYSPARK_PYTHON": str(python), "SPARK_HOME": str(SPARK_HOME)}
        self.properties = ROOT / "conf" / "cluster.conf"
        self.config = folder / "flights.yaml"
        self.history = folder / "history"

    def start(self, script: Path, *arguments: str) -> tuple["subprocess.Popen[bytes]", Path]:
        """Start a script; return its process and the file that gets its output."""
        output = self.folder / f"{script.stem}-{time.monotonic_ns()}.log"
        command = [str(SPARK_HOME / "bin" / "spark-submit"), "--master", self.cluster.master]
        command += ["--properties-file", str(self.properties), "--py-files", str(self.library)]
        history = self.history / script.stem
        history.mkdir(parents=True, exist_ok=True)
        for key, value in {**QUICK, "spark.eventLog.dir": history.as_uri()}.items():
            command += ["--conf", f"{key}={value}"]
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*command, str(script), *arguments],
                cwd=self.folder,
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        return process, output

    def start_job(self, stage: str) -> tuple["subprocess.Popen[bytes]", Path]:
        return self.start(ROOT / "jobs" / f"{stage}.py", "--config", str(self.config))

    def run_job(self, stage: str) -> str:
        """Run a stage to its end and return its output."""
        return self.ended_well(*self.start_job(stage))

    def run_all(self) -> str:
        """Run all stages to their end and return their output."""
        script = self.folder / "run_all.py"
        script.write_text(RUN_ALL, encoding="utf-8")
        return self.ended_well(*self.start(script, str(self.config)))

    def ended_well(self, process: "subprocess.Popen[bytes]", output: Path) -> str:
        status, text = process.wait(), output.read_text(encoding="utf-8")
        assert status == 0, text[-5000:]
        return text


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with standalone_cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the packages of this one, all but lc_spark."""
    folder = tmp_path_factory.mktemp("python") / "environment"
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # Python reads the .pth files of its own folder alone: not the one of an editable install.
    here = sysconfig.get_path("purelib")
    (packages / "others.pth").write_text(f"{here}\n", encoding="utf-8")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def library() -> Path:
    subprocess.run(["make", "-o", ".venv/.done", "wheel"], cwd=ROOT, check=True)
    return ROOT / "dist" / "lc_spark.zip"


@pytest.fixture(scope="module")
def submitter(
    cluster: Cluster, python: Path, library: Path, tmp_path_factory: pytest.TempPathFactory
) -> Submitter:
    """A maker of jobs over the 6,099 flights of a week: the tables have a file a day."""
    folder = tmp_path_factory.mktemp("submitted")
    flights = datasets.flights()
    flights = flights[flights["date"] <= datetime.date(2013, 1, 7)]
    flights.to_parquet(folder / "flights.parquet", coerce_timestamps="us")
    settings = yaml.safe_load((ROOT / "conf" / "flights.yaml").read_text(encoding="utf-8"))
    del settings["source"]["dataset"], settings["experiment"]
    settings["source"]["path"] = str(folder / "flights.parquet")
    settings |= {"workspace": str(folder / "workspace"), "systems": ["lr", "lc_dnn"]}
    settings["lr"] = {"max_iterations": 10, "l2": [1e-4]}
    settings["shards"] = {"folds": 2}
    # Epochs enough for a rank to be killed between two of them.
    settings["training"] |= {"epochs": 30, "patience": 30, "batch_size": 64, "hidden": [16, 8]}
    submitter = Submitter(cluster, python, library, folder)
    submitter.config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return submitter


@pytest.fixture(scope="module")
def output(submitter: Submitter) -> str:
    """What all stages wrote, run one after the other."""
    return submitter.run_all()


@pytest.fixture(scope="module")
def workspace(submitter: Submitter, output: str) -> Path:
    assert "score: started" in output
    return submitter.folder / "workspace"


def digest(part: bytes) -> str:
    """Return a hash of all of a part file but its footer.

    The footer lists a column's encodings in an order that one JVM and the next do not share.
    """
    footer = int.from_bytes(part[-8:-4], "little")
    return hashlib.sha256(part[: -8 - footer]).hexdigest()


def parts(workspace: Path) -> list[tuple[str, str]]:
    """Return split and content hash of each part file of the shards, in order."""
    files = sorted((workspace / "shards").glob("split=*/*.parquet"))
    return [(p.parent.name, digest(p.read_bytes())) for p in files]


def until(ready: Callable[[], bool], process: "subprocess.Popen[bytes]", output: Path) -> None:
    """Wait for a moment in the life of a job."""
    while not ready():
        assert process.poll() is None, output.read_text(encoding="utf-8")[-5000:]
        time.sleep(0.01)


def executor_logs(cluster: Cluster) -> list[Path]:
    return sorted(cluster.folder.glob("worker-*/app-*/*/stderr"))


def test_the_interpreter_has_the_packages_but_not_the_library(python: Path, tmp_path: Path) -> None:
    code = "import torch, petastorm, mlflow, pyspark; import lc_spark"
    done = subprocess.run(
        [python, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        check=False,
    )
    assert "No module named 'lc_spark'" in done.stderr


def test_cluster_settings_are_those_of_every_session() -> None:
    lines = (ROOT / "conf" / "cluster.conf").read_text(encoding="utf-8").splitlines()
    pairs = dict(line.split(maxsplit=1) for line in lines if not line.startswith("#"))
    assert session.SETTINGS.items() <= pairs.items()


def executors_of_stages(history: Path) -> dict[str, set[str]]:
    """Return the executors that ran tasks of each of our stages, from Spark's log of events."""
    events = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
    group = {
        number: event["Properties"].get("spark.jobGroup.id")
        for event in events
        if event["Event"] == "SparkListenerJobStart"
        for number in event["Stage IDs"]
    }
    executors: dict[str, set[str]] = {}
    for event in events:
        if event["Event"] == "SparkListenerTaskEnd":
            stage = group[event["Stage ID"]]
            executors.setdefault(stage, set()).add(event["Task Info"]["Executor ID"])
    return executors


def test_stages_run_on_both_executors(cluster: Cluster, submitter: Submitter, output: str) -> None:
    assert [log.parts[-4] for log in executor_logs(cluster)] == ["worker-0", "worker-1"]
    [history] = (submitter.history / "run_all").iterdir()
    executors = executors_of_stages(history)
    for stage in ("ingest", "features", "train_lr", "train_lc", "evaluate", "score"):
        assert executors[stage] == {"0", "1"}, stage
    assert "is models:/flights/1" in output
    assert "rows scored by models:/flights/1" in output


def test_ranks_sit_on_different_executors(cluster: Cluster, output: str) -> None:
    places = {int(rank): Path(folder) for rank, _, folder in PLACE.findall(output)}
    workers = {place.relative_to(cluster.folder).parts[0] for place in places.values()}
    assert set(places) == {0, 1}
    assert workers == {"worker-0", "worker-1"}


def test_a_killed_rank_is_named_and_the_next_run_goes_on(
    submitter: Submitter, workspace: Path
) -> None:
    model = workspace / "models" / "lc_dnn"
    undisturbed = (model / "model.safetensors").read_bytes()
    (model / "result.json").unlink()  # what says that it was trained
    (model / "model.safetensors").unlink()
    process, output = submitter.start_job("train_lc")
    until(lambda: any(model.glob("checkpoint/epoch-*")), process, output)
    [pid] = [int(p) for r, p, _ in PLACE.findall(output.read_text(encoding="utf-8")) if r == "1"]
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    assert process.wait() == 1
    assert time.monotonic() - killed < ENDS_WITHIN
    text = output.read_text(encoding="utf-8")
    assert re.search(r"Error: Training lc_dnn ended: rank 1 of 2 failed on 127.0.0.1 \(exec", text)
    again = submitter.run_job("train_lc")
    assert re.search(r"lc_dnn: going on from the checkpoint after epoch \d+", again)
    assert (model / "model.safetensors").read_bytes() == undisturbed


def test_an_executor_killed_while_encoding_leaves_the_same_bytes(
    cluster: Cluster, submitter: Submitter, workspace: Path
) -> None:
    before, known = parts(workspace), set(executor_logs(cluster))
    process, output = submitter.start_job("build_features")
    # The stage takes the manifest away when it begins to encode and write.
    until(lambda: not (workspace / "shards" / "manifest.json").exists(), process, output)
    victim = cluster.executors()[0]
    [log] = [log for log in executor_logs(cluster) if str(log.parent) == victim.cwd()]
    done = log.read_text(encoding="utf-8").count("Running task")
    until(lambda: log.read_text(encoding="utf-8").count("Running task") > done, process, output)
    victim.kill()
    assert process.wait() == 0, output.read_text(encoding="utf-8")[-5000:]
    assert len(set(executor_logs(cluster)) - known) == 3, "two executors, and one in its place"
    assert len(before) > 3
    assert parts(workspace) == before


@pytest.fixture
def store(submitter: Submitter) -> Iterator[s3fs.S3FileSystem]:
    """An object store that speaks S3, with a bucket that holds the flights."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"key": "somebody", "secret": "nothing"}
    found = s3fs.S3FileSystem(**keys, endpoint_url=f"http://{host}:{port}")
    found.mkdir("clicks")
    found.put(str(submitter.folder / "flights.parquet"), "clicks/flights.parquet")
    yield found
    server.stop()


def on_store(submitter: Submitter, store: s3fs.S3FileSystem) -> Submitter:
    """Return a submitter whose source and workspace lie on the store."""
    folder = submitter.folder / "store"
    folder.mkdir()
    on_it = Submitter(submitter.cluster, submitter.python, submitter.library, folder)
    address = str(store.endpoint_url)
    aws = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": str(store.key),
        "AWS_SECRET_ACCESS_KEY": str(store.secret),
    }
    on_it.environment |= aws
    lines = [(ROOT / "conf" / name).read_text("utf-8") for name in ("cluster.conf", "s3.conf")]
    lines += [f"spark.executorEnv.{key} {value}\n" for key, value in aws.items()]
    lines += [f"spark.hadoop.fs.s3a.endpoint {address}\n"]
    lines += ["spark.hadoop.fs.s3a.endpoint.region us-east-1\n"]
    lines += ["spark.hadoop.fs.s3a.path.style.access true\n"]
    on_it.properties = folder / "s3.conf"
    on_it.properties.write_text("".join(lines), encoding="utf-8")
    settings = yaml.safe_load(submitter.config.read_text(encoding="utf-8"))
    settings |= {"workspace": "s3a://clicks/workspace"}
    settings["tracking"] = {"uri": f"sqlite:///{folder}/mlflow.db"}
    settings["source"]["path"] = "s3a://clicks/flights.parquet"
    settings["training"]["epochs"] = 2
    on_it.config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return on_it


def test_source_and_workspace_on_an_object_store(
    submitter: Submitter, store: s3fs.S3FileSystem, workspace: Path
) -> None:
    on_it = on_store(submitter, store)
    output = on_it.run_all()
    files = sorted(store.glob("clicks/workspace/shards/split=*/*.parquet"))
    found = [(f.split("/")[-2], digest(store.cat(f))) for f in files]
    assert found == parts(workspace)
    for table in ("raw", "vocabulary", "lr_weights", "evaluation", "scores"):
        assert store.glob(f"clicks/workspace/tables/{table}/_delta_log/*.json"), table
    assert store.exists("clicks/workspace/models/lc_dnn/model.safetensors")
    assert "models:/flights/1" in output
    assert not list(on_it.folder.glob("**/s3a*")), "nothing took the URI for a local path"
