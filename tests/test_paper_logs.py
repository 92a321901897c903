"""Logs of the paper's size: their shape, and that a seed alone makes them."""

import datetime
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from lc_spark import config_file, paper_logs, pipeline
from lc_spark.field_kinds import Continuous, Crossed
from lc_spark.paper_logs import SHAPES, draw_block, plan_log

APPDATA = SHAPES["appdata"]
CONF = Path(__file__).parent.parent / "conf" / "appdata.yaml"


def drawn(name: str, rows: int, seed: int = 1) -> pa.Table:
    plan = plan_log(name, rows, seed)
    return pa.Table.from_batches(draw_block(plan, b) for b in range(-(-rows // 16_384)))


def features_of(column: pa.ChunkedArray) -> int:
    """Values that occur twice, missing, and the rest."""
    counts = pc.value_counts(column.drop_null())
    return 2 + int(pc.sum(pc.greater_equal(counts.field("counts"), 2)).as_py() or 0)


def texts_of(table: pa.Table) -> Iterable[pa.ChunkedArray]:
    return (
        table[name] for name in table.column_names if name.startswith("c") and name[1].isdigit()
    )


def test_the_sizes_are_those_of_the_papers_table() -> None:
    assert (APPDATA.rows, APPDATA.categorical + APPDATA.continuous) == (11_035_501, 158)
    feeds = SHAPES["feedsdata"]
    assert (feeds.rows, feeds.categorical + feeds.continuous) == (110_229_536, 2_311)
    plan = plan_log("appdata", APPDATA.rows, 1)
    assert plan.train_rows == 9_000_000


def test_d_is_in_proportion_to_the_rows() -> None:
    rows = 200_000
    log = drawn("appdata", rows)
    train = log.slice(0, round(rows * APPDATA.train_rows / APPDATA.rows))
    d = sum(features_of(column) for column in texts_of(train)) + 2 * APPDATA.continuous
    assert d == pytest.approx(APPDATA.d * rows / APPDATA.rows, rel=0.015)


def test_rows_are_as_the_docstring_says() -> None:
    rows = 100_000
    log = drawn("appdata", rows)
    assert log.num_rows == rows
    assert log.num_columns == 4 + 158
    assert log["impression"].to_pylist() == list(range(rows))
    days = log["date"].to_pylist()
    assert days == sorted(days)
    assert (days[0], days[-1]) == (datetime.date(2024, 4, 1), datetime.date(2024, 5, 8))
    test_rows = sum(day >= datetime.date(2024, 5, 2) for day in days)
    assert test_rows == rows - round(rows * APPDATA.train_rows / APPDATA.rows)
    shares = [column.null_count / rows for column in texts_of(log)]
    np.testing.assert_allclose(shares, np.resize([0, 0, 0.02, 0.1, 0.3], 132), atol=0.01)
    truth, clicked = log["true_probability"].to_numpy(), log["clicked"].to_numpy()
    assert truth.mean() == pytest.approx(0.1, abs=0.005)
    for low, high in ((0, 0.05), (0.05, 0.2), (0.2, 1)):
        some = (truth >= low) & (truth < high)
        assert clicked[some].mean() == pytest.approx(truth[some].mean(), abs=0.01)
    biggest = pc.value_counts(log["c131"]).field("counts").to_numpy()
    assert biggest.max() > 50 * biggest.mean()  # skewed


def test_a_seed_makes_one_log_whatever_the_partitions(spark: SparkSession, tmp_path: Path) -> None:
    plan = plan_log("appdata", 40_000, 3)
    assert draw_block(plan, 1).equals(draw_block(plan, 1))
    assert not draw_block(plan, 1).equals(draw_block(plan_log("appdata", 40_000, 4), 1))
    folder = tmp_path / "log"
    folder.mkdir()
    (folder / "left over").write_text("of a log before")
    assert paper_logs.write_log(spark, "appdata", 40_000, 3, str(folder)) == 40_000
    assert [path.suffix for path in folder.iterdir()] == [".parquet"] * len(list(folder.iterdir()))
    found = pq.read_table(folder).sort_by("impression")
    assert found.equals(drawn("appdata", 40_000, 3).select(found.column_names))


def test_feedsdata_has_its_many_fields() -> None:
    log = drawn("feedsdata", 2_000)
    assert log.num_columns == 4 + 2_311
    numbers = [name for name in log.column_names if name.startswith("n")]
    assert len(numbers) == 1_413
    assert all(log[name].type == pa.float64() for name in numbers)
    fields = config_file.load(CONF.with_name("feedsdata.yaml")).fields
    asked = [f.column for f in fields if not isinstance(f, Crossed)]
    assert asked == [name for name in log.column_names if name[0] in "cn" and name != "clicked"]
    assert [f.name for f in fields if isinstance(f, Continuous)] == numbers


@pytest.mark.slow
def test_the_config_runs_on_a_small_log(spark: SparkSession, tmp_path: Path) -> None:
    command = ["synth", "appdata", str(tmp_path / "log"), "--rows", "20000"]
    made = subprocess.run(
        [sys.executable, "-c", "from lc_spark.cli import main; main()", *command],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "20,000 rows" in made.stdout
    overrides = [f"source.path={tmp_path}/log", f"workspace={tmp_path}/workspace"]
    overrides += ["training.hidden=[16,8]", "training.batch_size=512", "shards.rows_per_group=2048"]
    config = config_file.load(CONF, overrides)
    for stage in ("ingest", "features", "train_lr", "train_lc", "evaluate"):
        facts = pipeline.run_stage(stage, spark, config)
    assert {result["system"] for result in facts["results"]} == {"lr", "lc_dnn"}
    assert all(0.5 < result["auc"] < 1 for result in facts["results"])
