"""Bad input, a full disk, too little memory: the right result, or one sentence and nothing half."""

import contextlib
import datetime
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import DEFAULTS, ConfigMaker, environment
from pyspark.sql import SparkSession
from pyspark.testing import assertDataFrameEqual
from safetensors.torch import load_file
from training_data import CATEGORICAL_MAP, FIELD_MAP, FOLDS, make_spec
from training_data import write_shards as write_made_up

from lc_spark import config_file, facts, failures, pipeline, session, tables
from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.facts import Facts
from lc_spark.features.shards import part_files, read_field_map, read_manifest
from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.systems import Lr
from lc_spark.training import launch, lr_choice, models
from lc_spark.training.loop import train
from lc_spark.training.spec import finished

ROOT = Path(__file__).parent.parent
FEATURES = ("ingest", "features")
LR = (*FEATURES, "train_lr")
N = 2_000
LABELS = [int(i % 5 < 2) for i in range(N)]


def categorical(name: str, **settings: Any) -> dict[str, Any]:
    return {"name": name, "kind": "categorical", **settings}


class Case:
    """A workspace, a folder of source files, and the stages as `lc-spark run` runs them."""

    def __init__(
        self, spark: SparkSession, make_config: ConfigMaker, folder: Path, runs: str
    ) -> None:
        self.spark, self.make_config, self.folder, self.runs = spark, make_config, folder, runs

    def write(self, **columns: Any) -> Path:
        """Write one more Parquet file of the source; without a label those of LABELS."""
        source = self.folder / "source"
        source.mkdir(exist_ok=True)
        path = source / f"{len(list(source.iterdir()))}.parquet"
        n = len(next(iter(columns.values())))
        pq.write_table(pa.table({"label": LABELS[:n], **columns}), path)
        return path

    def config(self, fields: list[dict[str, Any]], **settings: Any) -> Config:
        source = {"path": str(self.folder / "source"), **settings.pop("source", {})}
        own = {
            "workspace": str(self.folder / "workspace"),
            "fields": fields,
            "tracking": {"uri": self.runs},
            "systems": ["lr"],
            "lr": {"l2": 1e-2, "max_iterations": 3},
        }
        return self.make_config({**own, "source": source, **settings})

    def run(self, config: Config, *stages: str) -> dict[str, Facts]:
        return {name: pipeline.run_stage(name, self.spark, config) for name in stages}

    def refused(self, config: Config, stage: str) -> str:
        """Return the one sentence that a stage ends in, which must leave no facts of it."""
        with pytest.raises(LcSparkError) as caught:
            pipeline.run_stage(stage, self.spark, config)
        said = str(caught.value)
        assert "\n" not in said, "one paragraph, no stack trace"
        assert not facts.exists(config, stage)
        return said


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The MLflow store that all workspaces here share: a new one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('runs') / 'mlflow.db'}"


@pytest.fixture
def case(spark: SparkSession, make_config: ConfigMaker, tmp_path: Path, runs: str) -> Case:
    return Case(spark, make_config, tmp_path, runs)


def rows_by_split(config: Config) -> dict[str, list[int]]:
    """Return the rows of every part file, as they lie on the disk."""
    folder = config.workspace_path / "shards"
    return {
        split: [pq.ParquetFile(path).metadata.num_rows for path in part_files(folder, split)]
        for split in ("train", "valid", "test")
    }


def train_values(case: Case, config: Config, column: str) -> Counter[Any]:
    """Return how often each value occurs in the train rows of ``raw``: by their ids."""
    folder = config.workspace_path / "shards"
    ids = [pq.ParquetFile(p).read(["row_id"])["row_id"] for p in part_files(folder, "train")]
    raw = tables.read(case.spark, config, "raw").select("row_id", column).toPandas()
    kept = raw[raw["row_id"].isin(pa.chunked_array(ids).to_numpy())]
    return Counter(kept[column].tolist())


# A disk that fills up


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small file system is needed, and mount says: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, leave: int) -> None:
    """Leave so many bytes free, rounded up to whole pages."""
    (disk / "ballast").unlink(missing_ok=True)
    with (disk / "ballast").open("wb") as file:
        file.write(bytes(max(shutil.disk_usage(disk).free - leave, 0)))


def make_room(disk: Path) -> None:
    (disk / "ballast").unlink()


def random_words(n: int, length: int = 48) -> list[str]:
    """Return words that no codec makes smaller than half."""
    random = np.random.default_rng(0)
    return [random.bytes(length).hex() for _ in range(n)]


def test_raw_that_finds_no_room_is_not_there_and_the_same_command_makes_it(
    case: Case, disk: Path
) -> None:
    n = 6_000
    case.write(user=random_words(n), site=["a", "b"] * (n // 2), label=[0, 1] * (n // 2))
    config = case.config([categorical("site")], workspace=str(disk / "workspace"))
    fill(disk, 150_000)
    said = case.refused(config, "ingest")
    assert said.startswith("The stage 'ingest' ended early. No space is left on the disk of ")
    assert f"{disk}/workspace/tables/raw. Free on this machine now: " in said
    assert f"the workspace {disk}/workspace 0.0" in said
    assert "of 0.04 GB" in said
    assert "give the same command again" in said
    assert not tables.exists(case.spark, config, "raw")
    make_room(disk)
    made = case.run(config, "ingest")["ingest"]
    assert (made["source_rows"], made["raw_rows"], made["rejected"]) == (n, n, {})
    raw_df = tables.read(case.spark, config, "raw")
    source_df = case.spark.read.parquet(str(case.folder / "source"))
    assert raw_df.select("user", "site").exceptAll(source_df.select("user", "site")).isEmpty()


def test_a_table_stays_as_it_was_wherever_the_disk_fills_up(case: Case, disk: Path) -> None:
    config = case.config([categorical("site")], workspace=str(disk / "workspace"))
    before_df = case.spark.range(5).toDF("row_id")
    after_df = case.spark.range(500, 4_000, 1, 1).toDF("row_id")
    assert tables.write(before_df, config, "raw") == 0
    said: list[str] = []
    for leave in range(0, 80 * 4096, 2 * 4096):  # the data, its checksum, the commit, its checksum
        fill(disk, leave)
        try:
            with failures.told(case.spark, "The test", config.workspace_path):
                tables.write(after_df, config, "raw")
            break
        except LcSparkError as error:
            said.append(str(error))
            assertDataFrameEqual(tables.read(case.spark, config, "raw"), before_df)
    assert len(said) > 2
    assert all("No space is left on the disk of" in sentence for sentence in said)
    assertDataFrameEqual(tables.read(case.spark, config, "raw"), after_df)
    make_room(disk)
    version = tables.version(case.spark, config, "raw")
    assert tables.write(before_df, config, "raw") == version + 1
    assertDataFrameEqual(tables.read(case.spark, config, "raw"), before_df)


def test_a_network_that_finds_no_room_goes_on_to_the_same_weights(
    case: Case, disk: Path, tmp_path: Path
) -> None:
    sizes = {"train": (400, 400), "valid": (200,)}
    settings: dict[str, Any] = {"hidden": [256, 64], "epochs": 2}
    for folder in (tmp_path / "undisturbed", disk):
        folder.mkdir(exist_ok=True)
        write_made_up(folder, FIELD_MAP, sizes)
    undisturbed = make_spec(tmp_path / "undisturbed", **settings)
    train(undisturbed)
    spec = make_spec(disk, **settings)
    model = Path(spec.output)
    # Full at the first note, in the first model, in the first checkpoint, in the second.
    for leave in (0, 60_000, 200_000, 320_000):
        fill(disk, leave)
        with (
            pytest.raises(LcSparkError, match=r"No space is left on the disk of the workspace"),
            failures.told(case.spark, "The training", disk),
        ):
            train(spec)
        assert finished(spec) is None
        if (model / models.DESCRIPTION_FILE).exists():
            models.load(model)
        make_room(disk)
    train(spec)
    weights = [load_file(Path(each.output) / models.MODEL_FILE) for each in (undisturbed, spec)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert sorted(p.name for p in model.iterdir()) == [
        "model.json",
        "model.safetensors",
        "result.json",
    ]


@pytest.mark.slow
def test_every_later_stage_can_find_the_disk_full_and_be_run_again(case: Case, disk: Path) -> None:
    n = 40_000
    labels = np.random.default_rng(1).integers(0, 2, n)
    sites = [f"s{i % 500}" for i in range(n)]
    case.write(user=2 * random_words(n // 2, 8), site=sites, label=labels)
    config = case.config(
        [categorical("site"), categorical("user", min_count=1)],
        workspace=str(disk / "workspace"),
        systems=["lr", "lc_dnn"],
        training={**DEFAULTS["training"], "start": "lr"},
    )
    workspace = disk / "workspace"
    case.run(config, "ingest")
    fill(disk, 200_000)
    assert str(workspace / "levels.parquet") in case.refused(config, "features")
    assert not (workspace / "levels.parquet").exists()
    make_room(disk)
    for stage, leave, place in (
        ("features", 750_000, "shards"),
        ("train_lr", 200_000, "vectors/"),
        ("train_lc", 100_000, ""),
    ):
        fill(disk, leave)
        said = case.refused(config, stage)
        assert "No space is left on the disk of" in said
        assert str(workspace / place) in said
        if stage == "features":
            with pytest.raises(LcSparkError, match="run the stage 'features' first"):
                read_manifest(config)
        make_room(disk)
        made = case.run(config, stage)
        if stage == "features":
            assert sum(made["features"]["shard_rows"].values()) == n
    # A run that nothing disturbs makes the same models.
    (workspace / "models").rename(workspace / "before")
    case.run(config, "train_lr", "train_lc")
    for name in ("lr", "lc_dnn"):
        pair = [load_file(workspace / at / name / models.MODEL_FILE) for at in ("before", "models")]
        for tensor in pair[0]:
            np.testing.assert_allclose(pair[0][tensor], pair[1][tensor], rtol=1e-6, atol=1e-9)


def run_job(
    job: str, config: Config, folder: Path, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a script of jobs/ as a command, with a Spark of its own."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "--config", str(path)]
    return subprocess.run(
        command, env=environment() | more, capture_output=True, text=True, check=False
    )


def only_error(done: subprocess.CompletedProcess[str]) -> str:
    """Return the sentence that a command ended in, without a stack trace of Python's."""
    assert done.returncode == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    [said] = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    return said


@pytest.mark.slow
def test_a_full_spark_local_dir_is_told_by_the_command(case: Case, disk: Path) -> None:
    n = 20_000
    case.write(user=random_words(n, 2_000), label=[0, 1] * (n // 2))
    base = DEFAULTS["spark"]
    local = {**base["settings"], "spark.local.dir": str(disk)}
    config = case.config([categorical("user", min_count=1)], spark={**base, "settings": local})
    fill(disk, 1_000_000)
    said = only_error(run_job("ingest", config, case.folder))
    assert said.startswith("Error: The start of Spark ended early. No space is left on the disk of")
    assert f"spark.local.dir {disk}" in said
    case.run(config, "ingest")
    fill(disk, 22_000_000)  # Delta's jars come first
    done = run_job("build_features", config, case.folder)
    said = only_error(done)
    assert said.startswith("Error: The stage 'features' ended early. No space is left on the disk")
    assert "\n\tat " not in done.stderr, "no stack trace of Java's either"
    assert f"the disk of spark.local.dir {disk}" in said
    assert not (config.workspace_path / "shards" / "manifest.json").exists()
    make_room(disk)
    assert sum(case.run(config, "features")["features"]["shard_rows"].values()) == n


# Memory


@pytest.mark.slow
def test_a_vocabulary_too_large_for_the_driver_is_told_by_the_command(case: Case) -> None:
    case.write(site=[f"s{i}" for i in range(N)])
    base = DEFAULTS["spark"]
    small = {**base, "settings": {**base["settings"], "spark.driver.maxResultSize": "10k"}}
    config = case.config([categorical("site", min_count=1)], spark=small)
    case.run(config, "ingest")
    said = only_error(run_job("build_features", config, case.folder))
    assert "more than spark.driver.maxResultSize (10k): raise it" in said
    assert "spark.driver_memory, which is 2g" in said


@pytest.mark.slow
def test_a_heap_too_small_for_the_work_is_told_by_the_command(case: Case) -> None:
    # So many features that the weights and corrections just fit, and nothing beside them.
    site = replace(FIELD_MAP.fields[0], size=1_900_000)
    field_map = FieldMap((site, *CATEGORICAL_MAP.fields[1:]))
    sizes = {"train": (400, 400), "valid": (200,)}
    workspace = case.folder / "workspace"
    write_made_up(workspace, field_map, sizes)
    config = case.config(
        [categorical("site")],
        spark={**DEFAULTS["spark"], "driver_memory": "512m"},
        shards={"folds": FOLDS},
        lr={"l2": 1e-6, "max_iterations": 30, "tolerance": 1e-12},
    )
    said = only_error(run_job("train_lr", config, case.folder))
    assert "Java" in said
    assert "raise spark.driver_memory, which is 512m" in said
    assert not (workspace / "models" / "lr").exists()


def test_lr_that_cannot_fit_the_heap_is_refused_before_it_starts(case: Case) -> None:
    heap, tasks = session.heap_and_tasks(case.spark)
    assert (heap, tasks) == (2 * 2**30, 2)
    most = heap // (8 * (lr_choice.VECTORS + tasks))
    assert lr_choice.chosen(Lr(), most, tasks, heap) == "mllib"
    with pytest.raises(LcSparkError):
        lr_choice.chosen(Lr(), most + 1, tasks, heap)
    case.write(site=["a", "b"] * (N // 2))
    config = case.config([categorical("site", hashed=9_000_000)])
    case.run(config, "ingest")
    field_map = FieldMap((FieldInfo("site", "categorical", 9_000_001, hashed=9_000_000),))
    field_map.write(config.workspace_path / "field_map.json")
    manifest = config.workspace_path / "shards" / "manifest.json"
    manifest.parent.mkdir()
    manifest.write_text(f'{{"fingerprint": "{field_map.fingerprint}"}}', encoding="utf-8")
    said = case.refused(config, "train_lr")
    assert said.startswith("MLlib's LR over 9,000,001 features needs 2.45 GB on the driver")
    assert "has 2.15 GB: set lr.by to torch (--set lr.by=torch), or raise spark.driver" in said


@pytest.mark.parametrize("how", ["killed", "greedy"])
def test_a_python_worker_without_memory_is_told_with_the_setting(case: Case, how: str) -> None:
    def work(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        yield from batches
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        np.ones(2**60, np.int8)

    with (
        pytest.raises(LcSparkError, match="A Python process was killed") as caught,
        failures.told(case.spark, "The stage 'features'", None),
    ):
        case.spark.range(10).mapInArrow(work, "id long").collect()
    said = str(caught.value)
    assert said.startswith("The stage 'features' ended early. ")
    assert "spark.driver_memory, which is 2g. Lower that" in said


@pytest.mark.slow
def test_a_killed_rank_is_told_with_the_setting(case: Case, tmp_path: Path) -> None:
    write_made_up(tmp_path, FIELD_MAP, {"train": (400, 400), "valid": (200,)})
    spec = make_spec(tmp_path, ranks=2, epochs=10_000, patience=10_000)
    killed = threading.Event()

    def kill_rank_1() -> None:
        while not killed.is_set():
            for process in psutil.Process().children(recursive=True):
                # Not the processes that start and watch it, which have no rank.
                with contextlib.suppress(psutil.Error):
                    if process.environ().get("RANK") == "1":
                        process.kill()
                        killed.set()
            time.sleep(0.2)

    killer = threading.Thread(target=kill_rank_1)
    killer.start()
    with (
        pytest.raises(LcSparkError, match=r"^Training lc_dnn ended: rank 1 of 2 failed") as caught,
        failures.told(case.spark, "The stage 'train_lc'", tmp_path),
    ):
        launch.launch_specs(case.spark, [spec])
    killed.set()
    killer.join()
    assert "A Python process was killed" in str(caught.value)
    assert "spark.driver_memory, which is 2g. Lower that" in str(caught.value)
    assert finished(spec) is None


def test_what_is_no_failure_of_the_machine_is_left_as_it_came(case: Case) -> None:
    told = failures.told(case.spark, "The stage 'features'", None)
    with pytest.raises(ZeroDivisionError), told:
        1 / 0  # noqa: B018
    sentence = "Field 'site' reads column 'site', which the table lacks."
    with pytest.raises(LcSparkError) as caught, failures.told(case.spark, "x", None):
        raise LcSparkError(sentence)
    assert str(caught.value) == sentence


# Values that are not evenly spread, that say nothing, that are all different


@pytest.fixture(scope="module")
def odd(
    spark: SparkSession,
    make_config: ConfigMaker,
    tmp_path_factory: pytest.TempPathFactory,
    runs: str,
) -> tuple[Case, Config, dict[str, Facts]]:
    """A log of odd columns, through LR."""
    case = Case(spark, make_config, tmp_path_factory.mktemp("odd"), runs)
    random = np.random.default_rng(3)
    case.write(
        site=np.where(random.random(N) < 0.9, "hot", [f"v{i}" for i in range(N)]),
        a=[f"a{i}" for i in range(N)],
        b=[f"b{i}" for i in range(N)],
        empty=pa.nulls(N, pa.string()),
        none=pa.nulls(N, pa.float64()),
        same=[3.5] * N,
    )
    fields = [
        categorical("site", min_count=1),
        categorical("a", min_count=1),
        categorical("b", min_count=2),
        categorical("b1", column="b", min_count=1),
        categorical("empty"),
        {"name": "none", "kind": "continuous"},
        {"name": "none_cut", "column": "none", "kind": "bucketed"},
        {"name": "same", "kind": "continuous"},
        {"name": "same_cut", "column": "same", "kind": "bucketed"},
        {"kind": "crossed", "of": ["a", "b1"], "min_count": 1},
        {"kind": "crossed", "name": "rare", "of": ["a", "b1"], "min_count": 2},
        {"kind": "crossed", "of": ["site", "b"], "min_count": 1},
        {"kind": "crossed", "of": ["empty", "none_cut"]},
    ]
    config = case.config(fields, shards={"rows_per_group": 100})
    return case, config, case.run(config, *LR)


@pytest.mark.slow
def test_every_odd_column_has_the_size_that_its_values_have(
    odd: tuple[Case, Config, dict[str, Facts]],
) -> None:
    case, config, made = odd
    n = made["features"]["shard_rows"]["train"]
    assert sum(made["features"]["shard_rows"].values()) == N
    sites = len(train_values(case, config, "site"))
    sizes = {info.name: info.size for info in read_field_map(config).fields}
    assert sizes == {
        "site": 2 + sites,
        "a": 2 + n,
        "b": 2,  # no value occurs twice
        "b1": 2 + n,
        "empty": 2,
        "none": 2,
        "none_cut": 2,
        "same": 2,
        "same_cut": 2,
        "a_x_b1": 2 + n,
        "rare": 2,
        "site_x_b": 2 + sites,  # of b it sees one index
        "empty_x_none_cut": 2,
    }
    assert made["features"]["features"] == sum(sizes.values())


@pytest.mark.slow
def test_a_hot_value_is_counted_exactly_and_makes_no_large_part(
    odd: tuple[Case, Config, dict[str, Facts]],
) -> None:
    case, config, made = odd
    seen = train_values(case, config, "site")
    assert seen["hot"] > 0.85 * sum(seen.values())
    levels_df = tables.read(case.spark, config, "vocabulary").where("field = 'site'")
    counts = {row["value"]: row["count"] for row in levels_df.collect()}
    assert counts == {**seen, "(missing)": 0, "(other)": 0}
    for split, parts in rows_by_split(config).items():
        assert sum(parts) == made["features"]["shard_rows"][split]
        assert max(parts) - min(parts) <= 1


@pytest.mark.slow
def test_columns_that_say_nothing_are_one_index_and_values_never_seen_another(
    odd: tuple[Case, Config, dict[str, Facts]],
) -> None:
    _, config, _ = odd
    part = pq.ParquetFile(part_files(config.workspace_path / "shards", "valid")[0]).read()
    for name in ("empty", "none_cut", "empty_x_none_cut"):
        assert set(part[name].to_pylist()) == {0}, "missing"
    for name in ("a", "b", "b1", "a_x_b1", "rare"):
        assert set(part[name].to_pylist()) == {1}, "out of vocabulary"
    assert np.isnan(part["none"].to_numpy()).all()
    assert set(part["same"].to_pylist()) == {0.0}
    assert set(part["same_cut"].to_pylist()) == {1}


@pytest.mark.slow
def test_lr_over_odd_columns_has_a_finite_weight_for_every_feature(
    odd: tuple[Case, Config, dict[str, Facts]],
) -> None:
    case, config, made = odd
    weights = tables.read(case.spark, config, "lr_weights").toPandas()
    assert len(weights) == made["features"]["features"]
    assert np.isfinite(weights["weight"]).all()
    assert weights["value"].notna().all()


def test_rows_of_one_id_cannot_be_split_and_that_is_said(case: Case) -> None:
    case.write(site=["a", "b"] * (N // 2), id=[1] * N)
    config = case.config([categorical("site")], source={"row_id": ["id"]})
    case.run(config, "ingest")
    said = case.refused(config, "features")
    assert "split has no rows" in said
    assert "source.row_id" in said
    assert not (config.workspace_path / "shards" / "manifest.json").exists()


# Few rows or none, and long ones


@pytest.mark.slow
def test_empty_files_a_filter_that_empties_most_ids_that_repeat_and_texts_of_100_kb(
    case: Case,
) -> None:
    n, kept = 100, 60
    texts = [f"{i % 10:02d}" * 50_000 for i in range(n)]
    none = {"page": pa.array([], pa.string()), "id": pa.array([], pa.int64())}
    case.write(**none, label=pa.array([], pa.int64()))
    for _ in range(3):
        case.write(page=texts, id=np.arange(n) // 2)
        case.write(**none, label=pa.array([], pa.int64()))
    source = {"row_id": ["id"], "reject": {"old": f"id >= {kept // 2}"}, "max_rejected": 0.5}
    config = case.config([categorical("page")], source=source)
    made = case.run(config, *FEATURES)
    assert made["ingest"]["source_rows"] == 3 * n
    assert made["ingest"]["rejected"] == {"old": 3 * (n - kept)}
    assert made["ingest"]["raw_rows"] == 3 * kept == sum(made["features"]["shard_rows"].values())
    seen = train_values(case, config, "page")
    assert set(map(len, seen)) == {100_000}
    levels = tables.read(case.spark, config, "vocabulary").where("index > 1").toPandas()
    assert dict(zip(levels["value"], levels["count"], strict=True)) == seen
    assert read_field_map(config).d == 2 + len(seen)
    manifest = read_manifest(config)
    for split, parts in rows_by_split(config).items():
        assert manifest["splits"][split]["row_groups"] == parts
        assert len(parts) == 2, "one a rank"
    folder = config.workspace_path / "shards"
    paths = [path for split in ("train", "valid", "test") for path in part_files(folder, split)]
    ids = [set(pq.ParquetFile(p).read(["row_id"])["row_id"].to_pylist()) for p in paths]
    assert sum(len(found) for found in ids) == len(set().union(*ids)) == kept // 2, "together"


def test_a_table_without_rows_is_refused(case: Case) -> None:
    case.write(site=pa.array([], pa.string()), label=pa.array([], pa.int64()))
    config = case.config([categorical("site")])
    assert case.refused(config, "ingest") == (
        "The source has no rows (for this date): nothing was changed in 'raw'."
    )
    assert not tables.exists(case.spark, config, "raw")


def test_a_day_without_rows_leaves_the_days_before(case: Case) -> None:
    day = datetime.date(2024, 4, 1)
    case.write(site=["a", "b"] * (N // 2), day=[day] * N)
    config = case.config([categorical("site")], source={"date": "day"})
    case.run(config.for_day(day), "ingest")
    before = tables.version(case.spark, config, "raw")
    said = case.refused(config.for_day(day + datetime.timedelta(days=1)), "ingest")
    assert said.startswith("The source has no rows (for this date)")
    assert tables.version(case.spark, config, "raw") == before
    assert tables.read(case.spark, config, "raw").count() == N


@pytest.mark.slow
def test_a_split_of_one_row_is_refused_with_its_number(case: Case) -> None:
    days = [datetime.date(2024, 4, day) for day in (1, 2, 3)]
    case.write(site=["a", "b"] * (N // 2), day=[days[0]] * (N - 11) + [days[1]] + [days[2]] * 10)
    split = {"by": "date", "valid_from": "2024-04-02", "test_from": "2024-04-03"}
    config = case.config([categorical("site")], source={"date": "day"}, split=split)
    case.run(config, "ingest")
    said = case.refused(config, "features")
    assert said.startswith("The valid split has 1 parts for 2 ranks: it has too few rows")
    assert not (config.workspace_path / "shards" / "manifest.json").exists()


# Files that cannot be read


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def scrambled(path: Path) -> None:
    """Turn over the bits of the pages, and leave the footer."""
    content = bytearray(path.read_bytes())
    half = slice(30, len(content) // 2)
    content[half] = bytes(byte ^ 0x5A for byte in content[half])
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "of_files"), [(cut_off, 1), (cut_off, 2), (emptied, 2), (scrambled, 2)]
)
def test_a_damaged_file_is_named(case: Case, damage: Callable[[Path], None], of_files: int) -> None:
    paths = [case.write(site=random_words(N)) for _ in range(of_files)]
    damage(paths[-1])
    config = case.config([categorical("site")])
    said = case.refused(config, "ingest")
    assert str(paths[-1]) in said
    assert "damaged" in said
    assert not tables.exists(case.spark, config, "raw")


def test_a_file_whose_column_is_of_another_type_is_named(case: Case) -> None:
    case.write(site=["a", "b"] * (N // 2), n=np.arange(N))
    other = case.write(site=["a", "b"] * (N // 2), n=[str(i) for i in range(N)])
    config = case.config([categorical("site"), categorical("n")])
    said = case.refused(config, "ingest")
    assert str(other.parent) in said
    assert "types" in said


TWICE = """\
name: test
workspace: there
source: {path: there}
label: label
split: {by: hash}
fields:
- {name: site, kind: categorical}
systems: [lr]
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("systems: [lr]", "systems: [lr]\nname: other", "line 9: the key 'name' .* after line 1"),
        ("kind: cat", "name: page, kind: cat", "line 7: the key 'name' .* after line 7"),
        ("{by: hash}", "\n  by: hash\n  by: date", "line 7: the key 'by' .* after line 6"),
    ],
)
def test_a_key_that_stands_twice_is_named_with_its_lines(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(TWICE, encoding="utf-8")
    assert config_file.load(path).name == "test"
    path.write_text(TWICE.replace(old, new), encoding="utf-8")
    with pytest.raises(LcSparkError, match=said):
        config_file.load(path)


def test_a_section_that_is_used_twice_by_an_anchor_is_no_double_key(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    text = TWICE.replace("- {name: site", "- &site {name: site")
    path.write_text(text.replace("systems", "- {<<: *site, name: page}\nsystems"), encoding="utf-8")
    assert [field.name for field in config_file.load(path).fields] == ["site", "page"]
