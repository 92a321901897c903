"""Encodes ``raw`` and writes it as shuffled Parquet shards, with a manifest that describes them."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from lc_spark import files
from lc_spark.config import Config
from lc_spark.encoder import Vocabulary
from lc_spark.errors import LcSparkError
from lc_spark.features.packed import KEPT, packed_df, part_writer
from lc_spark.field_map import FieldMap, require_same
from lc_spark.files import AnyPath
from lc_spark.ingest import split_column

SPLITS = ("train", "valid", "test")
RANGES = 4096  # ranges of shuffle keys that are counted to find where a part ends


def encoded_columns(batch: pa.RecordBatch, field_map: FieldMap) -> dict[str, NDArray[Any]]:
    """Return the encoded columns of a batch of a shard, as encoder.encode returned them."""
    columns = {}
    for info in field_map.fields:
        column = batch.column(info.name)
        if info.kind == "multivalued":
            flat = column.flatten().to_numpy(zero_copy_only=False)
            columns[info.name] = flat.reshape(-1, info.max_values)
        else:
            columns[info.name] = column.to_numpy(zero_copy_only=False)
    return columns


def write_shards(
    raw_df: DataFrame,
    field_map: FieldMap,
    vocabulary: Vocabulary,
    config: Config,
    raw_version: int,
) -> dict[str, Any]:
    """Write every split of ``raw`` as parts of equal size, one row group each.

    Rows lie in the order of a seeded hash of their id, so they are shuffled once and the same rows
    give the same parts whatever the partitioning. The number of parts is a multiple of the ranks;
    parts of a split differ by one row at most (equal row ids stay together). Returns the manifest,
    which is also written beside the parts. Raises LcSparkError when a split is empty.
    """
    keyed_df = raw_df.select(
        "*",
        split_column(config).alias("split"),
        F.xxhash64(F.lit(f"shuffle {config.seed}"), "row_id").alias("__key"),
        fold_column(config).alias("fold"),
        F.unix_date("date").alias("__days"),
    )
    ends = _part_ends(keyed_df, config)
    placed_df = keyed_df.withColumn("__part", _part_column(ends))
    n_parts = sum(len(split_ends) + 1 for split_ends in ends.values())
    folder = config.run_path / "shards"
    manifest_path = folder / "manifest.json"
    manifest_path.unlink(missing_ok=True)  # half-written shards must not look whole
    files.remove(folder)
    parts_df = _to_partitions(packed_df(placed_df, field_map, vocabulary, KEPT), n_parts)
    written_df = parts_df.mapInArrow(part_writer(str(folder), field_map), "rows long")
    written_df.agg(F.sum("rows")).collect()
    manifest = _manifest(folder, field_map, config, raw_version)
    files.write_text(manifest_path, json.dumps(manifest, indent=1))
    return manifest


def fold_column(config: Config) -> Column:
    """Return the fold of a row, 0 .. folds - 1, by a seeded hash of its id."""
    folds = F.lit(config.shards.folds)
    return F.pmod(F.xxhash64(F.lit(f"fold {config.seed}"), "row_id"), folds).cast("int")


def _part_ends(keyed_df: DataFrame, config: Config) -> dict[str, list[int]]:
    """Return for each split the shuffle keys at which a new part begins.

    Exact order statistics in two cheap passes over row ids: count ranges of keys, then look into
    the few ranges where a part ends.
    """
    ranks = config.most_ranks
    in_range = F.floor(F.col("__key") / F.lit(2**64 // RANGES)).cast("long")
    keys_df = keyed_df.select("split", "__key", in_range.alias("range"))
    counted = keys_df.groupBy("split", "range").count().collect()
    wanted: dict[tuple[str, int], list[int]] = {}
    for split in SPLITS:
        ranges = sorted((r["range"], r["count"]) for r in counted if r["split"] == split)
        rows = sum(count for _, count in ranges)
        if rows == 0:
            raise LcSparkError(
                f"The {split} split has no rows: check 'split' in the config and, since rows of "
                "one id stay together, source.row_id."
            )
        group = ranks * -(-rows // (ranks * config.shards.rows_per_group))
        n_parts = min(group, rows) if rows >= ranks else ranks
        totals = np.cumsum([count for _, count in ranges])
        for part in range(1, n_parts):
            position = part * rows // n_parts  # rows before this part
            at = int(np.searchsorted(totals, position, side="right"))
            within = position - (int(totals[at - 1]) if at else 0)
            wanted.setdefault((split, int(ranges[at][0])), []).append(within)
    ends: dict[str, list[int]] = {split: [] for split in SPLITS}
    inside = [(split, number) for split, number in wanted]
    spark = keyed_df.sparkSession
    few_df = keys_df.join(
        F.broadcast(spark.createDataFrame(inside, "split string, range long")), ["split", "range"]
    )
    keys: dict[tuple[str, int], list[int]] = {}
    for row in few_df.collect():
        keys.setdefault((row["split"], row["range"]), []).append(row["__key"])
    for (split, number), positions in wanted.items():
        ordered = sorted(keys[split, number])
        ends[split] += [ordered[within] for within in positions]
    return {split: sorted(set(found)) for split, found in ends.items()}


def _part_column(ends: dict[str, list[int]]) -> Column:
    """Return the number of a row's part, counted through the splits."""
    column, first = F.lit(None), 0
    for split in SPLITS:
        edges = F.array(*[F.lit(end) for end in ends[split]]).cast("array<long>")
        below = F.size(F.filter(edges, lambda edge: edge <= F.col("__key")))
        column = F.when(F.col("split") == split, F.lit(first) + below).otherwise(column)
        first += len(ends[split]) + 1
    return column.cast("int")


def _to_partitions(df: DataFrame, n_parts: int) -> DataFrame:
    """Repartition so that partition i holds exactly part i.

    Spark places a row by a hash of its key; so each part is given a key that falls to it.
    """
    candidates = df.sparkSession.range(n_parts * 20 + 100).select(
        F.col("id").cast("int").alias("key"),
        F.pmod(F.hash(F.col("id").cast("int")), F.lit(n_parts)).alias("partition"),
    )
    rows = candidates.groupBy("partition").agg(F.min("key").alias("key")).collect()
    key_of = {row["partition"]: row["key"] for row in rows}
    keys = F.array(*[F.lit(key_of[part]) for part in range(n_parts)])
    placed_df = df.withColumn("__partition", keys[F.col("__part")])
    return placed_df.repartition(n_parts, "__partition").drop("__partition")


def _manifest(
    folder: AnyPath, field_map: FieldMap, config: Config, raw_version: int
) -> dict[str, Any]:
    splits = {}
    ranks = config.most_ranks
    for split in SPLITS:
        parts = [_columns(path) for path in part_files(folder, split)]
        groups = [part.num_rows for part in parts]
        splits[split] = {
            "rows": sum(groups),
            "positives": int(sum(pc.sum(part["label"]).as_py() or 0 for part in parts)),
            "row_groups": groups,
            # Days since 1970, as the parts have them.
            "last_date": max(pc.max(part["date"]).as_py() for part in parts if part.num_rows),
        }
        if len(groups) % ranks:
            raise LcSparkError(
                f"The {split} split has {len(groups)} parts for {ranks} ranks: it has too few "
                "rows, or many rows share one id. Set source.row_id to columns that tell rows "
                "apart."
            )
    return {
        "fingerprint": field_map.fingerprint,
        "seed": config.seed,
        "ranks": ranks,
        "folds": config.shards.folds,
        "raw_version": raw_version,
        "fields": [info.name for info in field_map.fields],
        "splits": splits,
    }


def _columns(path: AnyPath) -> pa.Table:
    with path.open("rb") as file:
        return pq.read_table(file, columns=["label", "date"])


def first_date(manifest: dict[str, Any], days: int) -> int:
    """Return the first of the last `days` train days, in days since 1970."""
    return int(manifest["splits"]["train"]["last_date"]) - days + 1


def part_files(folder: AnyPath, split: str) -> list[AnyPath]:
    """Return the Parquet files of a split, in order."""
    return files.children(folder / f"split={split}", "*.parquet")


def read_manifest(config: Config) -> dict[str, Any]:
    """Read the manifest of the workspace's shards."""
    path = config.run_path / "shards" / "manifest.json"
    if not path.is_file():
        raise LcSparkError(f"There are no shards in {path.parent}: run the stage 'features' first.")
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return manifest


def read_field_map(config: Config) -> FieldMap:
    """Return the workspace's field map, after a look whether the shards are of it."""
    field_map = FieldMap.read(config.run_path / "field_map.json")
    require_same(field_map.fingerprint, read_manifest(config)["fingerprint"], "The shards")
    return field_map
