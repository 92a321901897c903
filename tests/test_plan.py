"""A plan tells rows exactly and d closely, and what to change where a run would not fit."""

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import ConfigMaker
from pyspark.sql import SparkSession
from rich.console import Console

from lc_spark import ingest, pipeline, plan_advice, plan_tables, tables, trial
from lc_spark.config import Config
from lc_spark.distinct import Estimate
from lc_spark.errors import LcSparkError
from lc_spark.features.shards import read_field_map, read_manifest
from lc_spark.features.sizes import PlannedFields, plan_fields
from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.parameters import parameter_count
from lc_spark.plan import Machine, Plan, of_trial
from lc_spark.systems import Lr
from lc_spark.training.lr_network import lr_bytes
from lc_spark.training.step_time import StepTime, step_time
from lc_spark.trial import Line, MllibTrial, Trial

ROWS = 20_000
FIELDS: list[dict[str, Any]] = [
    {"name": "user", "kind": "categorical"},
    {"name": "site", "kind": "categorical", "min_count": 5},
    {"name": "page", "kind": "categorical", "hashed": 300},
    {"name": "tags", "kind": "multivalued", "delimiter": "|"},
    {"name": "hour", "kind": "bucketed", "buckets": 8},
    {"name": "price", "kind": "continuous"},
    {"kind": "crossed", "of": ["user", "site"], "min_count": 2},
    {"kind": "crossed", "of": ["site", "hour"]},
]


def zipf(random: np.random.Generator, size: int, n: int = ROWS) -> Any:
    weights = np.arange(1.0, size + 1) ** -0.75
    return random.choice(size, n, p=weights / weights.sum())


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, make_config: ConfigMaker) -> Config:
    random = np.random.default_rng(5)
    rows = pd.DataFrame(
        {
            "user": [f"u{k}" for k in zipf(random, 5_000)],
            "site": [f"s{k}" if k else None for k in zipf(random, 200)],
            "page": zipf(random, 3_000),
            "tags": [f"t{a}|t{b}" for a, b in zip(zipf(random, 50), zipf(random, 50), strict=True)],
            "hour": random.integers(0, 24, ROWS),
            "price": random.normal(size=ROWS),
            "clicked": random.integers(0, 2, ROWS),
        }
    )
    rows.loc[::100, "clicked"] = 2  # 200 rows that ingest rejects
    path = tmp_path_factory.mktemp("source") / "rows.parquet"
    rows.to_parquet(path, index=False)
    return make_config(
        {
            "source": {"path": str(path), "max_rejected": 0.05},
            "label": "clicked",
            "fields": FIELDS,
            "systems": ["lr", "lc_dnn", "dnn"],
        }
    )


@pytest.fixture(scope="module")
def planned(spark: SparkSession, config: Config) -> Plan:
    """A plan from about a quarter of the rows."""
    return of_trial(config, trial.run_trial(spark, config, ROWS // 4), 2)


@pytest.fixture(scope="module")
def really(spark: SparkSession, config: Config, planned: Plan) -> tuple[dict[str, Any], FieldMap]:
    """What ingest and features make of the same rows: the facts of ingest, the field map."""
    assert planned.trial.timed_rows < ROWS / 3
    made = pipeline.run_stage("ingest", spark, config)
    pipeline.run_stage("features", spark, config)
    return made, read_field_map(config)


@pytest.mark.slow
def test_rows_are_those_that_ingest_and_features_make(
    planned: Plan, really: tuple[dict[str, Any], FieldMap], config: Config
) -> None:
    made, _ = really
    counted = planned.trial
    assert counted.source_rows == made["source_rows"] == ROWS
    assert counted.rejected == made["rejected"] == {"label is not 0 or 1": 200}
    assert sum(counted.split_rows.values()) == made["raw_rows"]
    shards = read_rows(config)
    assert counted.split_rows == shards


def read_rows(config: Config) -> dict[str, int]:
    splits = read_manifest(config)["splits"]
    return {split: int(part["rows"]) for split, part in splits.items()}


@pytest.mark.slow
def test_d_is_close_to_what_features_makes(
    planned: Plan, really: tuple[dict[str, Any], FieldMap]
) -> None:
    _, field_map = really
    assert planned.field_map.d == pytest.approx(field_map.d, rel=0.1)
    for info in field_map.fields:
        guess = planned.field_map[info.name]
        assert guess.kind == info.kind
        known = info.kind in ("bucketed", "continuous") or info.hashed is not None
        assert guess.size == (info.size if known else pytest.approx(info.size, rel=0.25))


@pytest.mark.slow
def test_from_all_rows_every_size_is_exact(
    spark: SparkSession, config: Config, really: tuple[dict[str, Any], FieldMap]
) -> None:
    _, field_map = really
    raw_df = ingest.rows_of_run(tables.read(spark, config, "raw"), config)
    train_df = raw_df.where(ingest.split_column(config) == "train")
    found = plan_fields(train_df, config.fields, train_df.count())
    sizes = {info.name: info.size for info in field_map.fields}
    assert {info.name: info.size for info in found.field_map.fields} == sizes
    assert found.d_between() == (field_map.d, field_map.d)


@pytest.mark.slow
def test_parameters_are_those_of_a_run_with_that_d(planned: Plan, config: Config) -> None:
    for system in config.systems:
        count = parameter_count(system.system, planned.field_map.d, 8, [8, 4])
        assert planned.parameters(system) == count


@pytest.mark.slow
def test_a_plan_leaves_nothing_in_the_workspace(planned: Plan) -> None:
    workspace = planned.config.workspace_path
    assert isinstance(workspace, Path)
    assert not (workspace / "plan").exists()


@pytest.mark.slow
def test_the_tables_say_from_how_many_rows_d_is_estimated(planned: Plan) -> None:
    output = io.StringIO()
    console = Console(width=120, file=output)
    for table in plan_tables.all_tables(planned):
        console.print(table)
    said = " ".join(output.getvalue().split())
    fields = planned.trial.fields
    assert f"estimate from {fields.sample_rows:,} of {fields.train_rows:,} train rows" in said
    for number in (planned.field_map.d, ROWS, planned.parameters(planned.networks[1]).total):
        assert f"{number:,}" in said
    for stage in ("ingest", "features", "train_lr", "train_lc", "evaluate"):
        assert stage in said
    assert plan_tables.sentence(planned).startswith("Fits: at most ")


@pytest.mark.parametrize(
    "changes",
    [
        {"source": {"path": "there/is/no/source"}},
        {"fields": [{"name": "user", "kind": "categorical", "column": "usr"}]},
        {"label": "clickd"},
    ],
)
def test_what_ingest_refuses_a_plan_refuses_in_the_same_words(
    spark: SparkSession, config: Config, make_config: ConfigMaker, changes: dict[str, Any]
) -> None:
    settings = {**config.model_dump(exclude={"workspace"}, exclude_unset=True), **changes}
    refused = make_config(settings)
    with pytest.raises(LcSparkError) as by_ingest:
        ingest.ingest(spark, refused)
    with pytest.raises(LcSparkError) as by_plan:
        trial.run_trial(spark, refused)
    assert str(by_plan.value) == str(by_ingest.value)


def test_steps_are_timed_for_every_network() -> None:
    infos = (
        FieldInfo("a", "categorical", 50),
        FieldInfo("b", "continuous", 2),
        FieldInfo("c", "multivalued", 20, max_values=3),
    )
    settings = Config.model_validate(
        {
            "name": "toy",
            "workspace": "w",
            "source": {"path": "rows"},
            "label": "y",
            "split": {"by": "hash"},
            "fields": [{"name": "a", "kind": "categorical"}],
            "systems": ["lc_dnn", "lc_wd", "lc_resnet", "dnn", "wide_deep", "lr_equivalent"],
        }
    )
    for system in settings.systems:
        training = settings.training_of(system)
        small = training.model_copy(update={"batch_size": 16, "hidden": (8, 4)})
        found = step_time(system.system, small, FieldMap(infos), 2)
        assert found.training > 0
        assert found.scoring > 0


def made_plan(
    make_config: ConfigMaker,
    size: int,
    memory: float,
    disk: float = 1e15,
    systems: tuple[str, ...] = ("lr", "lc_dnn"),
    ranks: int = 2,
) -> Plan:
    """Return a plan of one field of so many values on a machine of so many bytes."""
    config = make_config(
        {
            "systems": list(systems),
            "training": {"ranks": ranks, "hidden": [64], "start": "random"},
            "spark": {"driver_memory": "2g"},
        }
    )
    field_map = FieldMap((FieldInfo("site", "categorical", size),))
    fields = PlannedFields(field_map, {"site": Estimate(size, size, size)}, 1_000, 10_000)
    line = Line(1.0, 1e-4)
    counted = Trial(
        source_rows=20_000,
        rejected={},
        split_rows={"train": 10_000, "valid": 4_000, "test": 6_000},
        fields=fields,
        count_seconds=1.0,
        read_seconds=2.0,
        write=line,
        features=line,
        bytes_a_row={"raw": 100.0, "shards": 50.0},
        timed_rows=2_000,
        mllib=MllibTrial(line, line, 200.0),
    )
    steps = {system.name: StepTime(0.1, 0.01) for system in config.systems}
    machine = Machine(2, int(memory), int(disk), 5.0, 10**8)
    return Plan(config, field_map, counted, steps, None, machine)


def test_a_run_that_fits_says_so(make_config: ConfigMaker) -> None:
    plan = made_plan(make_config, 10_000, 16e9)
    assert plan.problem() == plan_advice.advice(plan) == ""
    assert plan_tables.sentence(plan).startswith("Fits: at most ")


def test_a_small_heap_is_told_how_large_it_must_be(make_config: ConfigMaker) -> None:
    plan = made_plan(make_config, 10_000_000, 64e9)
    assert "train_lr needs a heap of" in plan.problem()
    gigabytes = math.ceil(1.1 * plan.lr_heap / 2**30)
    assert plan_advice.advice(plan) == f"Set spark.driver_memory to {gigabytes}g."
    wider = plan_advice.changed(plan, {"spark": {"driver_memory": f"{gigabytes}g"}})
    assert wider.problem() == ""


def test_lr_by_torch_needs_no_heap_but_memory_of_its_ranks(make_config: ConfigMaker) -> None:
    plan = made_plan(make_config, 10_000_000, 64e9)
    by_torch = plan_advice.changed(plan, {"lr": {"by": "torch", "l2": [1e-5, 1e-4]}})
    assert by_torch.problem() == plan_advice.advice(by_torch) == ""
    each = plan.machine.rank_bytes + lr_bytes(10_000_000, 1, 2)
    assert by_torch.memory()["train_lr"]["ranks"] == 2 * each
    assert plan.memory()["train_lr"]["ranks"] == 0
    # Less memory than the JVM's heap would need, but as much as the ranks do.
    small = dataclasses.replace(plan, config=by_torch.config.model_copy(update={"lr": Lr(l2=1e-5)}))
    least = max(sum(parts.values()) for parts in small.memory().values())
    machine = dataclasses.replace(plan.machine, memory=int(1.15 * least))
    small = dataclasses.replace(small, machine=machine)
    assert plan_advice.advice(small) == "Set lr.by to torch."


def test_seconds_of_lr_by_torch_are_of_its_steps(make_config: ConfigMaker) -> None:
    plan = made_plan(make_config, 10_000, 16e9)
    settings = {"lr": {"by": "torch", "epochs": 3, "batch_size": 100}}
    by_torch = dataclasses.replace(
        plan_advice.changed(plan, settings),
        trial=dataclasses.replace(plan.trial, mllib=None),
        lr_step=StepTime(0.2, 0.05),
    )
    # Two ranks of 100 rows; train once more and valid twice to judge.
    steps, looks = 3 * 10_000 / 200, (10_000 + 2 * 4_000) / 200
    assert by_torch.seconds()["train_lr"] == pytest.approx(5.0 + steps * 0.2 + looks * 0.05)


@pytest.mark.slow
def test_a_plan_of_lr_by_torch_times_its_steps(spark: SparkSession, config: Config) -> None:
    by_torch = config.model_copy(update={"lr": Lr(by="torch", batch_size=256)})
    found = of_trial(by_torch, trial.run_trial(spark, by_torch, ROWS // 4), 2)
    assert found.trial.mllib is None
    assert "vectors" not in found.trial.bytes_a_row
    assert found.lr_step is not None
    assert 0 < found.lr_step.scoring < found.lr_step.training
    assert found.seconds()["train_lr"] > found.machine.rank_seconds


def test_too_many_ranks_are_told_how_many_fit(make_config: ConfigMaker) -> None:
    plan = made_plan(make_config, 1_000_000, 4e9, ranks=16)
    assert "train_lc needs" in plan.problem()
    assert plan_advice.advice(plan).startswith("Lower training.ranks to ")
    fewer = int(plan_advice.advice(plan).split()[3])
    assert plan_advice.changed(plan, {"training": {"ranks": fewer}}).problem() == ""
    assert plan_advice.changed(plan, {"training": {"ranks": fewer + 1}}).problem() != ""


def test_a_dnn_that_is_too_large_is_told_to_go(make_config: ConfigMaker) -> None:
    plan = made_plan(make_config, 4_000_000, 6e9, systems=("lr", "lc_dnn", "dnn"), ranks=1)
    assert plan.problem().startswith("train_lc needs")
    said = plan_tables.sentence(plan)
    assert said.startswith("Does not fit: ")
    assert said.endswith("ake 'dnn' out of systems.")


def test_too_many_features_are_told_which_field_to_hash(make_config: ConfigMaker) -> None:
    plan = made_plan(make_config, 3_000_000_000, 16e9)
    assert "MLlib's vectors hold 2,147,483,647 features" in plan.problem()
    assert "the field 'site' (3,000,000,000 features), or hash it (hashed: " in plan_advice.advice(
        plan
    )


def test_a_full_disk_is_told(make_config: ConfigMaker) -> None:
    plan = made_plan(make_config, 10_000, 16e9, disk=1e6)
    assert plan.problem().startswith("the workspace needs 0.0 GB of disk")
    assert "a larger disk (workspace)" in plan_advice.advice(plan)


def test_seconds_grow_with_rows_epochs_and_fits(make_config: ConfigMaker) -> None:
    plan = made_plan(make_config, 10_000, 16e9)
    seconds = plan.seconds()
    assert seconds["ingest"] == pytest.approx(2 * 1.0 + 2.0 + 1.0 + 20_000 * 1e-4)
    fits = len(plan.config.lr.l2) * (plan.config.lr.max_iterations + 1)
    vectors = 1.0 + 14_000 * 1e-4
    assert seconds["train_lr"] == pytest.approx(vectors + fits * (1.0 + 10_000 * 1e-4))
    steps, look = 10_000 // (2 * 512), 4_000 / (2 * 512) * 0.01
    assert seconds["train_lc"] == pytest.approx(5.0 + 5 * (steps * 0.1 + 2 * look))
    cross_fitted = plan_advice.changed(plan, {"training": {"start": "lr_cross_fitted"}})
    assert cross_fitted.held_out == [0.8] * 5
    assert cross_fitted.seconds()["train_lr"] > seconds["train_lr"]
    more = dataclasses.replace(plan.trial, split_rows={"train": 10**6, "valid": 1, "test": 1})
    assert dataclasses.replace(plan, trial=more).seconds()["features"] > seconds["features"]


@pytest.mark.parametrize(
    ("small", "large", "at_10"),
    [((1.0, 100), (3.0, 200), 0.15), ((2.0, 100), (3.0, 200), 1.1), ((3.0, 100), (2.0, 200), 2.0),
     ((2.0, 100), (2.3, 100), 2.3)],
)  # fmt: skip
def test_a_line_has_no_negative_part_and_needs_two_sizes(
    small: tuple[float, int], large: tuple[float, int], at_10: float
) -> None:
    line = trial.line_through(*small, *large)
    assert line.at(large[1]) == pytest.approx(large[0])
    assert line.at(10) == pytest.approx(at_10)
    assert min(line.fixed, line.a_row) >= 0


def test_what_would_end_or_slow_a_run_is_remarked(make_config: ConfigMaker) -> None:
    plan = made_plan(make_config, 10_000, 16e9)
    assert plan_tables.remarks(plan) == []
    bad = dataclasses.replace(plan.trial, rejected={"no label": 15_000})
    (said,) = plan_tables.remarks(dataclasses.replace(plan, trial=bad))
    assert said.startswith("Ingest would end: 15,000 of 20,000 rows")
    long = dataclasses.replace(plan.trial, split_rows={"train": 10**7, "valid": 1, "test": 1})
    (said,) = plan_tables.remarks(dataclasses.replace(plan, trial=long))
    assert said.startswith("LR's train rows take 2.2 GB, spark.driver_memory leaves 1.3 GB")
