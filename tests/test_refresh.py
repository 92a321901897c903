"""What a run takes over from an earlier one: indices, LR's weights, networks, optimisers."""

import dataclasses
import datetime
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import ConfigMaker, levels_of
from pydantic import TypeAdapter
from pyspark.ml.linalg import Vectors
from pyspark.sql import DataFrame, SparkSession
from training_data import CATEGORICAL_MAP, make_spec, write_lr, write_shards

from lc_spark import facts, refresh, registry, tracking
from lc_spark.config import Config
from lc_spark.encoder import encode
from lc_spark.errors import LcSparkError
from lc_spark.features.fit import Fitted, Grown, fit_features
from lc_spark.field_kinds import AnyField
from lc_spark.field_map import FieldMap
from lc_spark.pandas_rows import prepare_pandas
from lc_spark.systems import Training
from lc_spark.training import loop, lr, models
from lc_spark.training.learner import Learner
from lc_spark.training.start import at_start
from lc_spark.training.tensors import load_tensors
from lc_spark.training.world import World

SCHEMA = "row_id long, site string, hour string, price double, tags array<string>"
SETTINGS: list[dict[str, Any]] = [
    {"name": "site", "kind": "categorical", "min_count": 2},
    {"name": "hour", "kind": "categorical", "min_count": 1},
    {"name": "price", "kind": "bucketed", "buckets": 3},
    {"name": "value", "kind": "continuous", "column": "price"},
    {"name": "tags", "kind": "multivalued", "min_count": 1},
    {"kind": "crossed", "of": ["site", "hour"], "min_count": 1},
    {"kind": "crossed", "of": ["hour", "price", "site"], "min_count": 2},
    {"name": "mixed", "kind": "crossed", "of": ["site", "hour"], "hashed": 50},
]
ALONE = World(0, 1, torch.device("cpu"))


def fields_of(settings: list[dict[str, Any]]) -> list[AnyField]:
    made: list[AnyField] = TypeAdapter(list[AnyField]).validate_python(settings)
    return made


def rows(spark: SparkSession, sites: list[str | None], hours: list[str], first: int) -> DataFrame:
    made = [
        (first + i, site, hours[i % len(hours)], float(i % 7), [str(site), hours[0]])
        for i, site in enumerate(sites)
    ]
    return spark.createDataFrame(made, SCHEMA).coalesce(1)


def as_parent(fitted: Fitted) -> Grown:
    """What a later run reads of a fit."""
    table = pa.Table.from_batches(fitted.levels.batches())
    return Grown(fitted.field_map, SparkSession.active().createDataFrame(table))


@pytest.fixture(scope="module")
def yesterday(spark: SparkSession) -> tuple[DataFrame, Fitted]:
    df = rows(spark, ["a", "b", "a", None, "c", "b", "a", "c", "d"] * 2, ["6", "9", "12"], 0)
    return df, fit_features(df, fields_of(SETTINGS), seed=0)


@pytest.fixture(scope="module")
def today(spark: SparkSession, yesterday: tuple[DataFrame, Fitted]) -> tuple[DataFrame, Fitted]:
    """A day on which `b` and hour 12 are gone and `x`, `y`, `z` and hour 18 are new."""
    df = rows(spark, ["x", "a", "x", "y", "c", "y", "x", "z"] * 2, ["18", "6", "9"], 100)
    old = as_parent(yesterday[1])
    return df, fit_features(df, fields_of(SETTINGS), seed=0, old=old)


@pytest.mark.slow
def test_every_index_once_given_stays(
    yesterday: tuple[DataFrame, Fitted], today: tuple[DataFrame, Fitted]
) -> None:
    raw = yesterday[0].toPandas()
    before, after = yesterday[1], today[1]
    grown = after.field_map
    assert grown.parent == before.field_map.fingerprint != grown.fingerprint
    for name in ("site", "hour", "site_x_hour", "hour_x_price_x_site"):
        assert grown[name].size > before.field_map[name].size, name
    encoded = [
        encode(prepare_pandas(raw, fitted.field_map), fitted.field_map, fitted.vocabulary)
        for fitted in (before, after)
    ]
    for info in before.field_map.fields:
        np.testing.assert_array_equal(encoded[0][info.name], encoded[1][info.name], info.name)


@pytest.mark.slow
def test_new_values_come_after_by_count_and_old_ones_stay_with_count_0(
    today: tuple[DataFrame, Fitted], yesterday: tuple[DataFrame, Fitted]
) -> None:
    found = levels_of(today[1], "site")
    assert [(r["value"], r["count"]) for r in found] == [
        ("(missing)", 0),
        ("(other)", 0),
        ("a", 2),
        ("b", 0),
        ("c", 2),
        ("d", 0),
        ("x", 6),
        ("y", 4),
        ("z", 2),
    ]
    named = Counter(row["field"] for row in levels_of(today[1]) if row["value"] is not None)
    sizes = {info.name: info.size for info in today[1].field_map.fields}
    assert named == sizes


@pytest.mark.slow
def test_a_second_growth_grows_from_the_first(
    spark: SparkSession, today: tuple[DataFrame, Fitted]
) -> None:
    df = rows(spark, ["x", "new", "new"], ["6"], 200)
    old = as_parent(today[1])
    third = fit_features(df, fields_of(SETTINGS), seed=0, old=old)
    raw = today[0].toPandas()
    for fitted in (today[1], third):
        encoded = encode(prepare_pandas(raw, fitted.field_map), fitted.field_map, fitted.vocabulary)
        if fitted is today[1]:
            expected = encoded
    for name, indices in expected.items():
        np.testing.assert_array_equal(encoded[name], indices, name)
    same = {info.name: info.size for info in today[1].field_map.fields}
    grown = {info.name: info.size for info in third.field_map.fields}
    assert grown["site"] == same["site"] + 1
    assert grown["mixed"] == same["mixed"]


@pytest.mark.slow
def test_other_fields_are_refused(today: tuple[DataFrame, Fitted]) -> None:
    old = as_parent(today[1])
    for changed in ([*SETTINGS[:-1], {**SETTINGS[-1], "hashed": 60}], SETTINGS[:-1]):
        with pytest.raises(LcSparkError, match=r"the field 'mixed' differs.*scratch"):
            fit_features(today[0], fields_of(changed), seed=0, old=old)


@pytest.mark.slow
def test_from_scratch_values_not_seen_of_late_leave(
    yesterday: tuple[DataFrame, Fitted], today: tuple[DataFrame, Fitted]
) -> None:
    both_df = yesterday[0].unionByName(today[0])
    fitted = fit_features(both_df, fields_of(SETTINGS), seed=0, recent_df=today[0])
    found = levels_of(fitted, "site")[2:]
    assert {r["value"] for r in found} == {"a", "c", "x", "y", "z"}
    crosses = levels_of(fitted, "site_x_hour")[2:]
    assert crosses
    assert not [r for r in crosses if r["value"].startswith(("b ", "d ")) or "12" in r["value"]]


@pytest.mark.slow
def test_places_are_those_of_the_same_values_and_of_no_other_map(
    yesterday: tuple[DataFrame, Fitted], today: tuple[DataFrame, Fitted]
) -> None:
    old, new = yesterday[1].field_map, today[1].field_map
    places = old.places_in(new)
    assert len(places) == old.d
    assert len(set(places)) == old.d
    for info in old.fields:
        own = places[info.offset : info.offset + info.size]
        np.testing.assert_array_equal(own, new[info.name].offset + np.arange(info.size))
    with pytest.raises(LcSparkError, match="did not grow from"):
        new.places_in(old)


def test_lr_that_goes_on_reaches_the_same_loss_in_fewer_passes(
    spark: SparkSession, make_config: ConfigMaker
) -> None:
    random = np.random.default_rng(5)
    features = random.normal(size=(3000, 30)) * np.linspace(0.1, 3, 30)
    labels = random.random(3000) < 1 / (1 + np.exp(-features @ random.normal(size=30) - 0.3))
    made = [(float(y), Vectors.dense(x)) for y, x in zip(labels, features, strict=True)]
    df = spark.createDataFrame(made, ["label", "features"]).repartition(2).cache()
    config = make_config({"lr": {"l2": 1e-3, "tolerance": 1e-8}})
    part_df = df.where("rand(3) < 0.8")
    earlier, _ = lr.fit_lr(part_df, config, 1e-3)
    cold, _ = lr.fit_lr(df, config, 1e-3)
    warm, _ = lr.fit_lr(df, config, 1e-3, lr.LrStart(earlier.weights, earlier.bias))
    assert warm.loss_history[0] < cold.loss_history[0]
    assert warm.loss_history[-1] == pytest.approx(cold.loss_history[-1], abs=1e-7)
    np.testing.assert_allclose(warm.weights, cold.weights, atol=1e-3)
    assert warm.iterations < cold.iterations


GROWN_MAP = FieldMap(
    tuple(dataclasses.replace(f, size=f.size + 3) for f in CATEGORICAL_MAP.fields),
    parent=CATEGORICAL_MAP.fingerprint,
)


def learner_of(spec: Any, field_map: FieldMap) -> Learner:
    torch.manual_seed(spec.seed)
    settings = Training.model_validate(spec.training)
    model, copies = at_start(spec, settings, field_map)
    return Learner(model, settings, 10, ALONE, copies)


@pytest.mark.parametrize(
    ("system", "start"),
    [
        ("lc_dnn", "lr"),
        ("lc_dnn", "random"),
        ("lc_dnn", "lr_cross_fitted"),
        ("lc_wd", "lr"),
        ("lc_wd", "lr_cross_fitted"),
        ("dnn", "random"),
    ],
)
def test_a_network_goes_on_with_old_rows_and_new_ones_start_from_lr(
    tmp_path: Path, start: str, system: str
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    groups = {"train": [256, 256], "valid": [128], "test": [64]}
    specs = []
    for folder, field_map, scale in ((old, CATEGORICAL_MAP, 1.0), (new, GROWN_MAP, 2.0)):
        write_shards(folder, field_map, groups)
        weights = scale * np.linspace(-1, 1, field_map.d)
        write_lr(folder, field_map, weights)
        names = [write_lr(folder, field_map, weights + k, f"lr_fold_{k}") for k in range(3)]
        spec = make_spec(folder, system, start=start, m1="joint", channels=1, epochs=1)
        held_out = tuple(names) if start == "lr_cross_fitted" else ()
        specs.append(dataclasses.replace(spec, held_out_lr=held_out, keep_state=True))
    loop.train(specs[0])
    going_on = dataclasses.replace(
        specs[1], parent=specs[0].output, parent_map=str(old / "field_map.json")
    )
    before = load_tensors(Path(specs[0].output) / "learner.safetensors")
    fresh, learner = learner_of(specs[1], GROWN_MAP), learner_of(going_on, GROWN_MAP)
    places = torch.from_numpy(CATEGORICAL_MAP.places_in(GROWN_MAP))
    learner.take_over(before, places)
    after, untouched = learner.state(), fresh.state()
    others = torch.ones(GROWN_MAP.d, dtype=torch.bool)
    others[places] = False
    tables = [name for name in untouched if untouched[name].shape[:1].numel() % GROWN_MAP.d == 0]
    tables = [name for name in tables if untouched[name].ndim == 2]
    assert len(tables) >= 3, "weights and both moments"
    for name in tables:
        table = after[name].view(GROWN_MAP.d, -1)  # a feature's rows, one a fold, side by side
        assert torch.equal(table[places], before[name].view(CATEGORICAL_MAP.d, -1)), name
        assert torch.equal(table[others], untouched[name].view(table.shape)[others]), name
    for name in ("rows.steps", "adamw.0.exp_avg", "model.deep.layers.1.running_mean"):
        if name in before:
            assert torch.equal(after[name], before[name]), name
    # Rows of values that both know get the very logits that the old network gave them.
    random = np.random.default_rng(0)
    columns = [random.integers(0, f.size, 50) for f in CATEGORICAL_MAP.fields]
    logits = []
    for field_map, model in ((CATEGORICAL_MAP, Path(specs[0].output)), (GROWN_MAP, learner)):
        ids = np.stack([f.offset + c for f, c in zip(field_map.fields, columns, strict=True)], 1)
        network = models.load(model)[0] if isinstance(model, Path) else model.model.eval()
        if isinstance(model, Learner):
            model.settle()
        with torch.no_grad():
            logits.append(network(torch.from_numpy(ids), None))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-6, rtol=0)
    result = loop.train(going_on)
    assert len(result["epochs"]) == 1


def test_settings_that_no_longer_fit_the_old_network_are_said(tmp_path: Path) -> None:
    write_shards(tmp_path, CATEGORICAL_MAP, {"train": [256], "valid": [128]})
    spec = dataclasses.replace(make_spec(tmp_path, epochs=1), keep_state=True)
    loop.train(spec)
    state = load_tensors(Path(spec.output) / "learner.safetensors")
    wider = learner_of(make_spec(tmp_path, "lc_wd"), CATEGORICAL_MAP)
    with pytest.raises(LcSparkError, match=r"lacks .*model\.wide.*refresh\.mode to scratch"):
        wider.take_over(state, torch.arange(CATEGORICAL_MAP.d))


class Days:
    """A registry with a version a day, made as the stages would."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, day: str, promoted: bool = True) -> str:
        config = self.config.for_day(datetime.date.fromisoformat(day))
        parent = tracking.start_pipeline(config, {})
        bundle = Path(str(config.run_path), "bundle")
        bundle.mkdir(parents=True, exist_ok=True)
        CATEGORICAL_MAP.write(bundle / "field_map.json")
        weights = np.random.default_rng(len(registry.versions(config))).normal(
            size=CATEGORICAL_MAP.d
        )
        lr_model = models.Lr.from_weights(weights, 0.0)
        models.save(lr_model, bundle, CATEGORICAL_MAP.fingerprint, {})
        with tracking.stage(config, parent, "evaluate") as run:
            version = registry.register(config, run, bundle, "lr", {})
        facts.write(config, "evaluate", {"registered": f"models:/{config.model_name}/{version}"})
        if promoted:
            registry.promote(config, version, "test")
        return version

    def parent(self, day: str) -> tuple[str, str] | None:
        found = refresh.find_parent(self.config.for_day(datetime.date.fromisoformat(day)))
        return None if found is None else (found.day, found.version)


def test_a_run_goes_on_from_the_last_earlier_day_that_was_promoted(
    make_config: ConfigMaker, caplog: pytest.LogCaptureFixture
) -> None:
    source = {"path": "there/is/no/source", "date": "day"}
    window = {"by": "window", "days": 5}
    config = make_config({"split": window, "source": source, "refresh": {"mode": "append"}})
    days = Days(config)
    assert days.parent("2013-01-01") is None
    assert "starts from scratch" in caplog.text
    assert days.run("2013-01-01") == "1"
    assert days.parent("2013-01-01") is None, "not from itself, run a second time"
    assert days.parent("2013-01-02") == ("2013-01-01", "1")
    days.run("2013-01-02", promoted=False)
    assert days.parent("2013-01-03") == ("2013-01-01", "1"), "the gate stopped the day between"
    days.run("2013-01-03")
    assert days.parent("2013-01-04") == ("2013-01-03", "3")
    assert days.parent("2013-01-03") == ("2013-01-01", "1")
    registry.rollback(config, "it was bad")
    assert days.parent("2013-01-04") == ("2013-01-01", "1")
    days.run("2013-01-01", promoted=False)
    assert days.parent("2013-01-02") is None, "the day's files are of a model that was stopped"
    assert "no longer holds it" in caplog.text
    scratch = make_config({"split": window, "source": source, "workspace": config.workspace})
    assert refresh.find_parent(scratch.for_day(datetime.date(2013, 1, 4))) is None


def test_days_that_left_the_window_and_shards_of_earlier_days_are_removed(
    make_config: ConfigMaker,
) -> None:
    source = {"path": "there/is/no/source", "date": "day"}
    config = make_config({"split": {"by": "window", "days": 2}, "source": source})
    for day in ("2013-01-01", "2013-01-03", "2013-01-04", "2013-01-06"):
        for name in ("shards", "models"):
            (Path(config.workspace) / "days" / day / name).mkdir(parents=True)
    refresh.tidy(config.for_day(datetime.date(2013, 1, 5)))
    left = {str(p.relative_to(config.workspace)) for p in Path(config.workspace).glob("days/*/*")}
    assert left == {
        "days/2013-01-03/models",
        "days/2013-01-04/models",
        "days/2013-01-06/models",
        "days/2013-01-06/shards",
    }


def test_networks_see_the_window_or_the_days_since_the_run_they_go_on_from(
    make_config: ConfigMaker,
) -> None:
    source = {"path": "there/is/no/source", "date": "day"}
    parent = refresh.Parent("2013-02-27", "3", "f" * 16)
    for train_on, first in (("window", None), ("new_days", datetime.date(2013, 2, 28))):
        config = make_config(
            {
                "split": {"by": "window"},
                "source": source,
                "refresh": {"mode": "append", "train_on": train_on},
            }
        )
        assert refresh.first_train_date(config, parent) == first
        assert refresh.first_train_date(config, None) is None
