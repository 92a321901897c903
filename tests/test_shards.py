"""Raw rows to shards: what lies in which file, in which order, and what the manifest says."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ConfigMaker
from pyspark.sql import DataFrame, SparkSession

from lc_spark.config import Config
from lc_spark.encoder import Vocabulary, encode
from lc_spark.errors import LcSparkError
from lc_spark.features.shards import SPLITS, part_files, read_manifest, write_shards
from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.hashing import hash_text
from lc_spark.pandas_rows import prepare_pandas

SITES, TAGS = ["JFK", "LAX", "東京"], ["a", "b", "c"]
WORDS = [("site", SITES), ("tags", TAGS)]
HASHES = [(f, hash_text(word), i) for f, words in WORDS for i, word in enumerate(words, start=2)]
VOCABULARY = Vocabulary.from_arrow(
    pa.table(
        {
            "field": [row[0] for row in HASHES] + ["site_x_hour"],
            "hash": [row[1] for row in HASHES] + [2 * 4 + 1],  # JFK in the first hours
            "index": pa.array([row[2] for row in HASHES] + [2], pa.int32()),
        }
    )
)
FIELD_MAP = FieldMap(
    (
        FieldInfo("site", "categorical", 5, column="site", column_type="string"),
        FieldInfo("hour", "bucketed", 4, column="hour", column_type="int", cut_points=(8.0, 16.0)),
        FieldInfo(
            "price", "continuous", 2, column="price", column_type="double", mean=5, sd=2, high=10
        ),
        FieldInfo(
            "tags", "multivalued", 5, column="tags", column_type="array<string>", max_values=2
        ),
        FieldInfo("site_x_hour", "crossed", 3, of=("site", "hour")),
    )
)
SCHEMA = "row_id long, label float, site string, hour int, price double, tags array<string>"
N_ROWS = 1001
RANKS, FOLDS = 2, 3


def make_rows(n: int) -> pd.DataFrame:
    """Return raw rows in which every column but the row id repeats, missing values too."""
    at = np.arange(n)
    sites = [*SITES, "unseen", "", None]
    sets = [["a"], ["b", "a"], ["c", "unseen", "b"], [], None]
    return pd.DataFrame(
        {
            "row_id": (at * 7919 - 3_000_000).astype(np.int64),
            "label": (at % 3 == 0).astype(np.float32),
            "site": [sites[i % 6] for i in at],
            "hour": pd.array([None if i % 10 == 9 else i % 24 for i in at], "Int32"),
            "price": [None if i % 7 == 0 else i % 13 - 1.0 for i in at],
            "tags": [sets[i % 5] for i in at],
        }
    )


def in_spark(spark: SparkSession, raw: pd.DataFrame) -> DataFrame:
    rows_df = spark.createDataFrame(
        [tuple(None if value is pd.NA else value for value in row) for row in raw.values.tolist()],
        SCHEMA,
    ).replace(float("nan"), None)
    return rows_df.selectExpr(
        "*", "date_add(DATE'2013-03-01', CAST(pmod(row_id, 5) AS INT)) AS date"
    )


def shards_of(config: Config, split: str) -> list[pd.DataFrame]:
    folder = config.workspace_path / "shards"
    # By ParquetFile, since read_table would add the split that the path names.
    return [pq.ParquetFile(path).read().to_pandas() for path in part_files(folder, split)]


def all_rows(config: Config) -> pd.DataFrame:
    parts = [part.assign(split=split) for split in SPLITS for part in shards_of(config, split)]
    return pd.concat(parts, ignore_index=True)


def contents(config: Config) -> dict[str, list[dict[str, list[Any]]]]:
    """Return the rows of every file, in order."""
    folder = config.workspace_path / "shards"
    return {s: [pq.read_table(path).to_pydict() for path in part_files(folder, s)] for s in SPLITS}


@pytest.fixture(scope="module")
def raw() -> pd.DataFrame:
    return make_rows(N_ROWS)


@pytest.fixture(scope="module")
def raw_df(spark: SparkSession, raw: pd.DataFrame) -> DataFrame:
    return in_spark(spark, raw).coalesce(1)


@pytest.fixture(scope="module")
def config(make_config: ConfigMaker) -> Config:
    return make_config({"shards": {"rows_per_group": 90, "folds": FOLDS}})


@pytest.fixture(scope="module")
def manifest(raw_df: DataFrame, config: Config) -> dict[str, Any]:
    return write_shards(raw_df, FIELD_MAP, VOCABULARY, config, raw_version=12)


@pytest.fixture(scope="module")
def rows(config: Config, manifest: dict[str, Any]) -> pd.DataFrame:
    assert manifest["splits"]
    return all_rows(config)


def test_every_row_is_in_one_shard_once(raw: pd.DataFrame, rows: pd.DataFrame) -> None:
    assert sorted(rows["row_id"]) == sorted(raw["row_id"])


def test_the_splits_have_the_shares_of_the_config(rows: pd.DataFrame) -> None:
    shares = rows["split"].value_counts(normalize=True)
    assert shares["valid"] == pytest.approx(0.2, abs=0.04)
    assert shares["test"] == pytest.approx(0.3, abs=0.04)


def test_the_manifest_counts_what_the_files_hold(
    config: Config, manifest: dict[str, Any], rows: pd.DataFrame
) -> None:
    for split in SPLITS:
        parts = shards_of(config, split)
        said = manifest["splits"][split]
        assert said["row_groups"] == [len(part) for part in parts]
        assert said["rows"] == sum(len(part) for part in parts)
        assert said["positives"] == sum(int(part["label"].sum()) for part in parts)
    assert sum(manifest["splits"][split]["rows"] for split in SPLITS) == len(rows) == N_ROWS
    assert sum(manifest["splits"][split]["positives"] for split in SPLITS) == 334


def test_the_manifest_says_what_the_shards_were_made_with(
    config: Config, manifest: dict[str, Any]
) -> None:
    assert {key: value for key, value in manifest.items() if key != "splits"} == {
        "fingerprint": FIELD_MAP.fingerprint,
        "seed": 7,
        "ranks": RANKS,
        "folds": FOLDS,
        "raw_version": 12,
        "fields": ["site", "hour", "price", "tags", "site_x_hour"],
    }
    assert read_manifest(config) == manifest
    path = config.workspace_path / "shards" / "manifest.json"
    assert json.loads(path.read_text(encoding="utf-8")) == manifest


def test_parts_are_equal_within_one_row_and_a_multiple_of_the_ranks(
    manifest: dict[str, Any],
) -> None:
    for split in SPLITS:
        groups = manifest["splits"][split]["row_groups"]
        assert len(groups) % RANKS == 0
        assert max(groups) - min(groups) <= 1
        assert max(groups) <= 90
    # No more parts than needed: about 500 train rows, 90 a part at most, two ranks.
    assert len(manifest["splits"]["train"]["row_groups"]) == 6


def test_a_file_has_one_row_group(config: Config, manifest: dict[str, Any]) -> None:
    folder = config.workspace_path / "shards"
    paths = [path for split in SPLITS for path in part_files(folder, split)]
    assert len(paths) == sum(len(manifest["splits"][s]["row_groups"]) for s in SPLITS)
    assert [pq.read_metadata(path).num_row_groups for path in paths] == [1] * len(paths)


def test_the_columns_have_the_types_that_the_readers_expect(
    config: Config, manifest: dict[str, Any]
) -> None:
    assert manifest["splits"]
    for split in SPLITS:
        path = part_files(config.workspace_path / "shards", split)[0]
        schema = pq.ParquetFile(path).schema_arrow
        types = {name: str(schema.field(name).type) for name in schema.names}
        assert types.pop("tags").startswith("list<")
        assert types == {
            "row_id": "int64",
            "label": "float",
            "fold": "int32",
            "date": "int32",
            "site": "int32",
            "hour": "int32",
            "price": "float",
            "site_x_hour": "int32",
        }


def test_shards_hold_what_encode_makes_of_the_raw_rows(
    raw: pd.DataFrame, rows: pd.DataFrame
) -> None:
    encoded = encode(prepare_pandas(raw, FIELD_MAP), FIELD_MAP, VOCABULARY)
    written = rows.set_index("row_id").loc[raw["row_id"]]
    for name in ("site", "hour", "price", "site_x_hour"):
        np.testing.assert_array_equal(written[name], encoded[name], err_msg=name)
    assert [tags.tolist() for tags in written["tags"]] == encoded["tags"].tolist()
    np.testing.assert_array_equal(written["label"], raw["label"])


@pytest.mark.parametrize(
    ("row", "site", "hour", "price", "tags", "cross"),
    [
        (0, 2, 1, np.nan, [2, -1], 2),  # JFK, 0, missing, [a], JFK × [-inf, 8)
        (1, 3, 1, -2.5, [2, 3], 1),  # LAX, 1, 0.0, [b, a], rare
        (5, 0, 1, -0.5, [2, -1], 1),  # null, 5, 4.0, [a]; a cross with one missing parent
        (9, 1, 0, 1.5, [0, -1], 1),  # unseen, null, 8.0, null
        (11, 0, 2, 2.5, [2, 3], 1),  # null, 11, 10.0, [b, a]
        (12, 2, 2, 2.5, [1, 3], 1),  # JFK, 12, 11.0 above the fitted range, [c, unseen, b]
        (29, 0, 0, -1.5, [0, -1], 0),  # null, null, 2.0, null: the cross is missing
    ],
)
def test_single_rows(
    raw: pd.DataFrame,
    rows: pd.DataFrame,
    row: int,
    site: int,
    hour: int,
    price: float,
    tags: list[int],
    cross: int,
) -> None:
    written = rows.set_index("row_id").loc[raw["row_id"][row]]
    assert [written[n] for n in ("site", "hour", "site_x_hour")] == [site, hour, cross]
    assert written["price"] == pytest.approx(price, nan_ok=True)
    assert written["tags"].tolist() == tags


def test_folds_are_in_range_and_independent_of_the_split(rows: pd.DataFrame) -> None:
    assert set(rows["fold"]) == set(range(FOLDS))
    shares = rows.groupby("split")["fold"].value_counts(normalize=True)
    np.testing.assert_allclose(shares, 1 / FOLDS, atol=0.12)


def test_rows_are_shuffled(raw: pd.DataFrame, config: Config, manifest: dict[str, Any]) -> None:
    assert manifest["splits"]
    ids = np.concatenate([part["row_id"] for part in shards_of(config, "train")])
    place = {row_id: i for i, row_id in enumerate(raw["row_id"])}
    places = np.array([place[row_id] for row_id in ids])
    assert abs(np.corrcoef(places, np.arange(len(places)))[0, 1]) < 0.15
    # A label or a fold must not gather in some of the files.
    positives = [part["label"].mean() for part in shards_of(config, "train")]
    np.testing.assert_allclose(positives, 1 / 3, atol=0.2)


def test_the_same_seed_gives_the_same_files_whatever_the_partitioning(
    raw_df: DataFrame, config: Config, manifest: dict[str, Any], make_config: ConfigMaker
) -> None:
    other = make_config(config.model_dump(exclude={"workspace"}))
    assert other.workspace_path != config.workspace_path
    written = write_shards(
        raw_df.repartition(5, "site"), FIELD_MAP, VOCABULARY, other, raw_version=12
    )
    assert written == manifest
    np.testing.assert_equal(contents(other), contents(config))


def test_another_seed_gives_another_order_split_and_fold(
    raw_df: DataFrame, config: Config, rows: pd.DataFrame, make_config: ConfigMaker
) -> None:
    other = make_config({**config.model_dump(exclude={"workspace"}), "seed": 8})
    written = write_shards(raw_df, FIELD_MAP, VOCABULARY, other, raw_version=12)
    assert written["seed"] == 8
    moved = all_rows(other)
    assert sorted(moved["row_id"]) == sorted(rows["row_id"])
    both = rows.merge(moved, on="row_id")
    assert (both["split_x"] == both["split_y"]).mean() < 0.6
    assert (both["fold_x"] == both["fold_y"]).mean() < 0.5
    kept = both[both["split_x"] == both["split_y"]]
    assert kept["row_id"].tolist() != [i for i in moved["row_id"] if i in set(kept["row_id"])]


def test_five_rows_a_split_are_enough_and_a_second_writing_replaces_the_first(
    spark: SparkSession, make_config: ConfigMaker, raw: pd.DataFrame
) -> None:
    by_date = {"by": "date", "valid_from": "2013-01-02", "test_from": "2013-01-03"}
    config = make_config({"split": by_date, "source": {"path": "x", "date": "date"}})
    few_df = (
        in_spark(spark, raw[:15])
        .drop("date")
        .selectExpr(
            "*", "date_add(DATE'2013-01-01', CAST((row_id + 3000000) / 7919 / 5 AS INT)) AS date"
        )
    )
    write_shards(few_df.unionByName(few_df), FIELD_MAP, VOCABULARY, config, raw_version=0)
    manifest = write_shards(few_df, FIELD_MAP, VOCABULARY, config, raw_version=1)
    assert manifest["raw_version"] == 1
    groups = {split: manifest["splits"][split]["row_groups"] for split in SPLITS}
    assert {split: sorted(sizes) for split, sizes in groups.items()} == {
        "train": [2, 3],
        "valid": [2, 3],
        "test": [2, 3],
    }
    written = all_rows(config)
    first = dict(zip(raw["row_id"], np.arange(15) // 5, strict=False))
    assert [SPLITS[first[row_id]] for row_id in written["row_id"]] == written["split"].tolist()
    assert len(written) == 15


def test_equal_row_ids_stay_together_and_none_is_lost(
    spark: SparkSession, make_config: ConfigMaker, raw: pd.DataFrame
) -> None:
    few = raw[:120].copy()
    few["row_id"] = few["row_id"].to_numpy()[np.arange(120) // 3]  # each id three times
    config = make_config({"shards": {"rows_per_group": 15}})
    manifest = write_shards(in_spark(spark, few), FIELD_MAP, VOCABULARY, config, raw_version=0)
    written = all_rows(config)
    assert Counter(written["row_id"]) == Counter(few["row_id"])
    for split in SPLITS:
        groups = manifest["splits"][split]["row_groups"]
        assert len(groups) % RANKS == 0
        assert max(groups) - min(groups) <= 3
        files = [set(part["row_id"]) for part in shards_of(config, split)]
        assert sum(len(ids) for ids in files) == len(set.union(*files))


def test_an_empty_split_is_an_error_and_leaves_no_manifest(
    raw_df: DataFrame, make_config: ConfigMaker
) -> None:
    by_date = {"by": "date", "valid_from": "2013-01-02", "test_from": "2013-01-03"}
    config = make_config({"split": by_date, "source": {"path": "x", "date": "date"}})
    dated_df = raw_df.drop("date").selectExpr("*", "DATE'2013-01-01' AS date")
    with pytest.raises(LcSparkError, match="The valid split has no rows: check 'split'"):
        write_shards(dated_df, FIELD_MAP, VOCABULARY, config, raw_version=0)
    with pytest.raises(LcSparkError, match="run the stage 'features' first"):
        read_manifest(config)


def test_hidden_files_are_no_parts(tmp_path: Path) -> None:
    folder = tmp_path / "split=train"
    folder.mkdir()
    for name in ("part-1.parquet", ".part-1.parquet.crc", "_SUCCESS", "part-0.parquet"):
        (folder / name).touch()
    names = [path.name for path in part_files(tmp_path, "train")]
    assert names == ["part-0.parquet", "part-1.parquet"]
