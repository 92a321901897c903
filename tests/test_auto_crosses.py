"""Made-up clicks whose law is known: which pairs of fields are chosen as crosses, and which not."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import ConfigMaker
from numpy.typing import NDArray
from pyspark.sql import DataFrame, SparkSession

from lc_spark import facts, pipeline
from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.features.auto_crosses import Choice, choose_crosses
from lc_spark.features.shards import read_field_map, read_manifest

N_ROWS = 12_000


def categorical(*names: str) -> list[dict[str, Any]]:
    return [{"name": name, "kind": "categorical"} for name in names]


def clicks(
    spark: SparkSession, logits: NDArray[Any], columns: dict[str, NDArray[Any]]
) -> DataFrame:
    random = np.random.default_rng(1)
    n = len(logits)
    label = (random.random(n) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    date = pd.Timestamp("2024-01-01") + pd.to_timedelta(np.arange(n) * 20 // n, unit="D")
    own = {"row_id": np.arange(n) * 7919, "label": label, "date": date.date}
    return spark.createDataFrame(pd.DataFrame({**own, **columns}))


@pytest.fixture(scope="module")
def columns() -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(0)
    site = random.integers(0, 12, N_ROWS)
    return {
        "site": site,
        "region": site // 3,  # the site determines it
        "device": random.integers(0, 4, N_ROWS),
        # Mostly says what the site says.
        "theme": np.where(random.random(N_ROWS) < 0.8, site, random.integers(0, 12, N_ROWS)),
        "price": random.normal(0, 1, N_ROWS),
        "user": random.integers(0, 3_000, N_ROWS),
        "item": random.integers(0, 3_000, N_ROWS),
    }


@pytest.fixture(scope="module")
def config(make_config: ConfigMaker) -> Config:
    fields = categorical("site", "region", "device", "theme", "user", "item")
    fields += [{"name": "price", "kind": "bucketed", "buckets": 6}]
    return make_config({"fields": fields, "features": {"crosses": "auto"}})


@pytest.fixture(scope="module")
def xor_df(spark: SparkSession, columns: dict[str, NDArray[Any]]) -> DataFrame:
    odd = (columns["device"] % 2) ^ (columns["price"] > 0)
    return clicks(spark, 3.0 * odd - 1.5, columns)


@pytest.fixture(scope="module")
def xor_choice(xor_df: DataFrame, config: Config) -> Choice:
    return choose_crosses(xor_df, config)


def test_two_fields_that_speak_only_together_are_the_one_cross(xor_choice: Choice) -> None:
    assert [cross.of for cross in xor_choice.chosen] == [("device", "price")]
    best = xor_choice.chosen[0]
    # Knowing the rates .18 and .82 for certain is worth ln 2 - H(.18) = 0.219 nats a row.
    assert 0.15 < best.gain < 0.225
    assert best.gain > 20 * best.standard_error
    assert (best.cells, best.rows) == (24, N_ROWS)
    assert (best.cross.name, best.cross.min_count) == ("device_x_price", 5)
    assert xor_choice.tried[0].of == ("device", "price")


def test_every_pair_is_accounted_for(xor_choice: Choice) -> None:
    # Of 7 fields' 21 pairs only site and region determine one another.
    assert (len(xor_choice.tried), xor_choice.determined, xor_choice.untried) == (20, 1, 0)
    assert ("site", "region") not in [pair.of for pair in xor_choice.tried]
    gains = [pair.gain for pair in xor_choice.tried]
    assert gains == sorted(gains, reverse=True)


def test_fields_that_only_add_up_are_not_crossed(
    spark: SparkSession, columns: dict[str, NDArray[Any]], config: Config
) -> None:
    # Two strong fields, a third that repeats one of them, and ids of four rows each.
    site = np.linspace(-2, 2, 12)[columns["site"]]
    device = np.linspace(-1.5, 1.5, 4)[columns["device"]]
    user = np.random.default_rng(2).normal(0, 1, 3_000)[columns["user"]]
    choice = choose_crosses(clicks(spark, site + device + user - 1, columns), config)
    assert choice.chosen == []
    assert len(choice.tried) == 20
    ids = next(pair for pair in choice.tried if pair.of == ("user", "item"))
    assert ids.gain <= 0


def test_the_partitioning_changes_nothing(
    xor_df: DataFrame, xor_choice: Choice, config: Config
) -> None:
    again = choose_crosses(xor_df.repartition(5, "item"), config)
    assert again == xor_choice


def test_a_listed_pair_is_not_proposed_and_what_it_says_counts_as_known(
    xor_df: DataFrame, config: Config, make_config: ConfigMaker
) -> None:
    fields = [field.model_dump() for field in config.fields if field.name != "item"]
    # A finer copy of the device: crossing it with the price would say the same once more.
    fields += [{"name": "copy", "column": "device", "kind": "categorical", "min_count": 1}]
    fields += [{"kind": "crossed", "of": ["price", "device"], "min_count": 1}]
    listed = make_config({"fields": fields, "features": {"crosses": "auto"}})
    choice = choose_crosses(xor_df, listed)
    assert choice.chosen == []
    assert ("device", "price") not in [pair.of for pair in choice.tried]
    assert ("price", "copy") in [pair.of for pair in choice.tried]


def test_split_by_date_asks_for_what_holds_on_other_days(
    spark: SparkSession, columns: dict[str, NDArray[Any]], config: Config, make_config: ConfigMaker
) -> None:
    # Each pair of sites and devices has its luck, drawn anew every five days.
    luck = np.random.default_rng(3).normal(0, 1, (4, 12, 4))
    block = np.arange(N_ROWS) * 4 // N_ROWS
    train_df = clicks(spark, luck[block, columns["site"], columns["device"]], columns)
    split = {"by": "date", "valid_from": "2024-02-01", "test_from": "2024-03-01"}
    settings = {**config.model_dump(), "split": split}
    settings["source"] = {"path": "none", "date": "day"}
    by_date = choose_crosses(train_df, make_config(settings))
    assert [c.of for c in choose_crosses(train_df, config).chosen] == [("site", "device")]
    assert by_date.chosen == []


def test_the_time_limit_leaves_pairs_and_says_how_many(
    xor_df: DataFrame, make_config: ConfigMaker, caplog: pytest.LogCaptureFixture
) -> None:
    fields = [
        {"name": f"price_{i}", "column": "price", "kind": "bucketed", "buckets": 8 + i}
        for i in range(60)
    ]
    settings = {"crosses": "auto", "seconds": 1}
    with caplog.at_level(logging.WARNING, "lc_spark"):
        choice = choose_crosses(xor_df, make_config({"fields": fields, "features": settings}))
    assert choice.untried > 0
    assert len(choice.tried) + choice.determined + choice.untried == 1_770
    assert f"{choice.untried:,} of 1,770 pairs were not tried in 1 s" in caplog.text


def test_a_sample_is_as_large_as_asked(
    xor_df: DataFrame, config: Config, make_config: ConfigMaker
) -> None:
    settings = {**config.model_dump(), "features": {"crosses": "auto", "sample_rows": 3_000}}
    choice = choose_crosses(xor_df, make_config(settings))
    assert 2_700 < choice.chosen[0].rows < 3_300
    assert choice.chosen[0].of == ("device", "price")


def test_an_empty_split_is_said(xor_df: DataFrame, config: Config) -> None:
    with pytest.raises(LcSparkError, match="train split has no rows"):
        choose_crosses(xor_df.where("false"), config)


@pytest.mark.slow
def test_the_features_stage_adds_the_chosen_cross(
    spark: SparkSession, xor_df: DataFrame, config: Config, make_config: ConfigMaker, tmp_path: Path
) -> None:
    xor_df.drop("row_id").withColumnRenamed("label", "clicked").write.parquet(f"{tmp_path}/rows")
    source = {"path": f"{tmp_path}/rows", "date": "date"}
    settings = {**config.model_dump(), "workspace": str(tmp_path / "workspace")}
    auto = make_config({**settings, "source": source, "label": "clicked"})
    pipeline.run_stage("ingest", spark, auto)
    made = pipeline.run_stage("features", spark, auto)
    assert [tuple(cross["of"]) for cross in made["auto_crosses"]] == [("device", "price")]
    assert 0.1 < made["auto_crosses"][0]["gain"] < 0.225
    field_map = read_field_map(auto)
    assert field_map.fields[-1].name == "device_x_price"
    assert field_map["device_x_price"].size == 2 + 4 * 6
    assert read_manifest(auto)["fields"][-1] == "device_x_price"
    assert [tuple(c["of"]) for c in facts.read(auto, "features")["auto_crosses"]] == [
        ("device", "price")
    ]
