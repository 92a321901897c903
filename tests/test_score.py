"""Rows of a day, before they have labels, get the scores and ids that they will be known by."""

import datetime
import json
import logging
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import ConfigMaker
from pyspark.sql import SparkSession
from test_tracking import make_bundle, register

from lc_spark import registry, scoring, tables, tracking
from lc_spark.config import Config
from lc_spark.encoder import encode
from lc_spark.errors import LcSparkError
from lc_spark.facts import Facts
from lc_spark.features import drift
from lc_spark.ingest import ingest
from lc_spark.pandas_rows import prepare_pandas
from lc_spark.training.scorer import Scorer

pytestmark = pytest.mark.slow

TODAY, TOMORROW = datetime.date(2013, 1, 1), datetime.date(2013, 1, 2)
Row = dict[str, Any]


def rows_of(date: datetime.date, n: int, **changes: Any) -> list[Row]:
    """Rows without label; the bundle of test_tracking reads color, shop, price and tags."""
    return [
        {
            "day": str(date),
            "n": i,
            "color": ("red", "blue", None, "green")[i % 4],
            "shop": 7 + i % 2,
            "price": i / 2,
            "tags": ["x", "y"][: i % 3],
            **changes,
        }
        for i in range(n)
    ]


class Log:
    """A source with one JSON file a day, and a champion."""

    def __init__(self, spark: SparkSession, make_config: ConfigMaker, folder: Path) -> None:
        self.spark, self.folder = spark, folder
        self.config = make_config(
            {
                "workspace": str(folder / "workspace"),
                "source": {
                    "path": str(folder / "{date}.json"),
                    "format": "json",
                    "date": "day",
                    "row_id": ["day", "n"],
                    "types": {"delay": "int"},
                    "derive": {"late": "delay > 15"},
                    "reject": {"cancelled": "delay IS NULL"},
                    "max_rejected": 0.2,
                },
                "label": "late",
                "fields": [
                    {"name": "color", "kind": "categorical"},
                    {"name": "shop", "kind": "categorical"},
                    {"name": "price", "kind": "continuous"},
                    {"name": "tags", "kind": "multivalued"},
                ],
            }
        )
        self.bundle = make_bundle(folder / "lr")
        scorer = Scorer(self.bundle)
        raw = pd.DataFrame(rows_of(TODAY, 1000))
        encoded = encode(prepare_pandas(raw, scorer.field_map), scorer.field_map, scorer.vocabulary)
        counts = drift.by_field(drift.count(encoded, scorer.field_map), scorer.field_map, 1000)
        (self.bundle / drift.TRAIN_COUNTS).write_text(counts.to_json())
        registry.promote(self.config, register(self.config, self.bundle, 0.5), "test")
        self.parent = tracking.start_pipeline(self.config, {})

    def write(self, date: datetime.date, rows: list[Row], *more_lines: str) -> None:
        lines = [json.dumps(row) for row in rows] + list(more_lines)
        (self.folder / f"{date}.json").write_text("\n".join(lines) + "\n")

    def score(self, date: datetime.date | None, config: Config | None = None) -> Facts:
        return scoring.score_stage(self.spark, (config or self.config).for_day(date), self.parent)

    def table(self, name: tables.TableName) -> pd.DataFrame:
        return tables.read(self.spark, self.config, name).toPandas()


@pytest.fixture(scope="module")
def log(
    spark: SparkSession, make_config: ConfigMaker, tmp_path_factory: pytest.TempPathFactory
) -> Log:
    return Log(spark, make_config, tmp_path_factory.mktemp("score"))


def test_tomorrows_rows_are_scored_before_their_labels_exist(
    log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    log.write(TODAY, rows_of(TODAY, 4, delay=0))
    log.score(TODAY)
    good = rows_of(TOMORROW, 20)
    bad = [{**good[0], "n": 90, "price": "cheap"}, {**good[0], "n": 91, "day": None}]
    log.write(TOMORROW, [*good, *bad, {**good[0], "n": 92, "day": str(TODAY)}], '{"n": 93, "day')
    with caplog.at_level(logging.WARNING, "lc_spark"):
        facts = log.score(TOMORROW)
    aside = {
        "column price is not double": 1,
        "no date": 1,
        "date of another day": 1,
        "the line does not parse": 1,
    }
    assert (facts["rows"], facts["set_aside"]) == (20, aside)
    assert "4 rows cannot be scored and were set aside" in caplog.text
    before = log.table("scores")
    assert before.groupby("date").size().to_dict() == {TODAY: 4, TOMORROW: 20}
    assert set(before["model"]) == {f"models:/{log.config.model_name}/1"}

    # A second run of the day leaves the same rows.
    log.score(TOMORROW)
    order = ["date", "row_id"]
    after = log.table("scores").sort_values(order, ignore_index=True)
    pd.testing.assert_frame_equal(after, before.sort_values(order, ignore_index=True))

    # The labels come: every row finds its score, and it is the score of the same raw columns.
    log.write(TOMORROW, [{**row, "delay": 30 * (row["n"] % 2)} for row in good])
    ingest(log.spark, log.config, TOMORROW)
    both = log.table("raw").merge(after, on="row_id", validate="one_to_one")
    assert len(both) == 20
    expected = Scorer(log.bundle).score_pandas(both[["color", "shop", "price", "tags"]])
    np.testing.assert_allclose(both["score"], expected, rtol=0, atol=1e-12)
    assert np.ptp(both["score"]) > 0.1


def test_without_a_date_all_rows_of_raw_are_scored(log: Log) -> None:
    log.write(TODAY, rows_of(TODAY, 5, delay=0))
    ingest(log.spark, log.config, TODAY)
    facts = log.score(None)
    raw, scores = log.table("raw"), log.table("scores")
    assert facts["rows"] == len(raw)
    assert sorted(scores["row_id"]) == sorted(raw["row_id"])


def test_a_day_that_cannot_be_scored_changes_nothing(log: Log) -> None:
    log.write(TODAY, rows_of(TODAY, 4))
    log.score(TODAY)
    version = tables.version(log.spark, log.config, "scores")
    rows = rows_of(TOMORROW, 8)
    one_file = log.config.source.model_copy(update={"path": str(log.folder / f"{TODAY}.json")})
    empty = log.config.model_copy(update={"source": one_file})
    with pytest.raises(LcSparkError, match=f"The source has no rows of {TOMORROW}: .*nothing"):
        log.score(TOMORROW, empty)
    log.write(TOMORROW, rows, *['{"half'] * 3)
    with pytest.raises(LcSparkError, match=r"3 of 11 rows cannot be scored \(the line.*= 0.2"):
        log.score(TOMORROW)
    log.write(TOMORROW, [{key: row[key] for key in row if key != "price"} for row in rows])
    with pytest.raises(LcSparkError, match="model reads column 'price', which the source lacks"):
        log.score(TOMORROW)
    with pytest.raises(LcSparkError, match=r"cannot read .*2013-01-03.json"):
        log.score(datetime.date(2013, 1, 3))
    assert tables.version(log.spark, log.config, "scores") == version


def test_fields_that_drifted_are_named_in_the_log_the_page_and_mlflow(
    log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    log.write(TODAY, rows_of(TODAY, 1000))
    with caplog.at_level(logging.WARNING, "lc_spark"):
        assert log.score(TODAY)["drifted"] == []
    assert not caplog.text
    rows = rows_of(TOMORROW, 1000)
    for row in rows[::2]:
        row["color"] = "violet"
    for row in rows[::3]:
        row["price"] = None
    log.write(TOMORROW, rows)
    with caplog.at_level(logging.WARNING, "lc_spark"):
        facts = log.score(TOMORROW)
    assert set(facts["drifted"]) == {"color", "price"}
    assert "2 of 4 fields drifted from the train rows by more than scoring.psi = 0.2" in caplog.text
    assert "color (PSI " in caplog.text
    page = (log.config.workspace_path / "report" / "scores.html").read_text()
    assert page.count(">drifted</span></th>") == 2
    assert "<svg" in page
    run_id, uri = facts["run_id"], tracking.uri_of(log.config)
    run = mlflow.MlflowClient(uri).get_run(run_id)
    assert run.data.metrics == {"rows": 1000, "set_aside": 0, "drifted_fields": 2}
    folder = Path(mlflow.artifacts.download_artifacts(run_id=run_id, tracking_uri=uri))
    table = json.loads((folder / "drift.json").read_text())
    shown = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert {row["field"] for row in shown} == {"color", "shop", "price", "tags"}
    price = next(row for row in shown if row["field"] == "price")
    assert (price["missing_train"], price["missing"]) == (0, pytest.approx(0.334))
    assert (folder / "drift.svg").exists()


def test_a_model_without_counts_is_scored_and_that_is_said(
    log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = make_bundle(log.folder / "old")
    registry.promote(log.config, register(log.config, bundle, 0.4), "test")
    log.write(TODAY, rows_of(TODAY, 4))
    with caplog.at_level(logging.WARNING, "lc_spark"):
        facts = log.score(TODAY)
    assert facts["model"] == f"models:/{log.config.model_name}/2"
    assert "so drift is not looked at" in caplog.text
    assert (facts["rows"], facts["drifted"]) == (4, [])
