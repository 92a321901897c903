"""Counts encoded rows by field and group of values, and says how far two such counts differ.

The train rows are counted once, and their counts go with the model; scored rows are counted as
they are scored.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from lc_spark import files
from lc_spark.errors import LcSparkError
from lc_spark.features.shards import encoded_columns
from lc_spark.field_map import MISSING, OUT_OF_VOCABULARY, PADDING, FieldInfo, FieldMap
from lc_spark.files import AnyPath

TRAIN_COUNTS = "train_counts.json"  # beside the field map, and in every bundle
MOST = 20  # groups of a field beside "missing", "out of vocabulary" and "the rest"
DECILES = np.array([NormalDist().inv_cdf(i / 10) for i in range(1, 10)])
SMALLEST_SHARE = 1e-4  # of a group in the index: an empty group must not make it infinite

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class FieldCounts:
    """How many values (a row has one of a field, but of a multivalued one) fell into which group.

    Group 0 is missing. Fields with a vocabulary go on with "out of vocabulary", the MOST most
    frequent values and the rest; others with up to MOST stretches of neighbouring buckets, or the
    ten deciles of a standardised number.
    """

    fingerprint: str
    rows: int
    groups: Mapping[str, Counts]

    def to_json(self) -> str:
        """Return the counts as JSON text."""
        groups = {name: counts.tolist() for name, counts in self.groups.items()}
        return json.dumps({"fingerprint": self.fingerprint, "rows": self.rows, "groups": groups})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what to_json wrote."""
        content = json.loads(text)
        groups = {name: np.array(counts) for name, counts in content["groups"].items()}
        return cls(content["fingerprint"], content["rows"], groups)


@dataclass(frozen=True)
class FieldDrift:
    """How far the scored rows are from the train rows in one field.

    Shares are of values; those out of vocabulary are None where the field has no vocabulary. psi
    is the population stability index, chance what it would be on average if nothing had changed.
    """

    field: str
    kind: str
    psi: float
    chance: float
    missing_train: float
    missing: float
    unseen_train: float | None
    unseen: float | None


def n_groups(info: FieldInfo) -> int:
    """Return the number of groups that the values of a field are counted by."""
    if info.kind == "continuous":
        return len(DECILES) + 2
    if info.has_vocabulary:
        return min(info.size, MOST + 3)
    return min(info.size, MOST + 1)


def _groups(info: FieldInfo, values: NDArray[Any]) -> NDArray[Any]:
    """Return the group of every encoded value."""
    if info.kind == "continuous":
        deciles = 1 + np.searchsorted(DECILES, values, side="right")
        return np.where(np.isnan(values), MISSING, deciles)
    values = values[values != PADDING] if info.kind == "multivalued" else values
    last = n_groups(info) - 1
    if info.has_vocabulary:
        return np.minimum(values, last)
    # Neighbours together: more groups would only be more noise in the index.
    stretch = 1 + (values.astype(np.int64) - 1) * last // max(info.size - 1, 1)
    return np.where(values == MISSING, MISSING, stretch)


def count(encoded: Mapping[str, NDArray[Any]], field_map: FieldMap) -> Counts:
    """Return the counts of encoded rows (see encoder.encode), all fields in one array."""
    return np.concatenate(
        [
            np.bincount(_groups(info, encoded[info.name]), minlength=n_groups(info))
            for info in field_map.fields
        ]
    )


def by_field(counts: Counts, field_map: FieldMap, rows: int) -> FieldCounts:
    """Take the array of ``count`` apart."""
    ends = np.cumsum([n_groups(info) for info in field_map.fields])
    parts = np.split(counts, ends[:-1])
    names = [info.name for info in field_map.fields]
    return FieldCounts(field_map.fingerprint, rows, dict(zip(names, parts, strict=True)))


def sum_counts(counts_df: DataFrame) -> Counts:
    """Return the sum of a column `counts` of arrays of one length; null arrays count nothing."""
    exploded_df = counts_df.select(F.posexplode("counts").alias("place", "n"))
    rows = exploded_df.groupBy("place").agg(F.sum("n").alias("n")).orderBy("place").collect()
    return np.array([row["n"] for row in rows], np.int64)


def count_shards(spark: SparkSession, parts: Sequence[AnyPath], field_map: FieldMap) -> FieldCounts:
    """Count the rows of part files of shards."""
    shared = spark.sparkContext.broadcast(field_map)
    names = [info.name for info in field_map.fields]

    def count_parts(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        # Read by pyarrow, not through Spark's rows: nothing but the counts leaves the task.
        for place in (place for batch in batches for place in batch.column("path").to_pylist()):
            with files.as_path(place).open("rb") as file:
                table = pq.read_table(file, columns=names).combine_chunks()
            for batch in table.to_batches():
                total = count(encoded_columns(batch, shared.value), shared.value)
                counts = pa.array([[batch.num_rows, *total.tolist()]], pa.list_(pa.int64()))
                yield pa.RecordBatch.from_arrays([counts], names=["counts"])

    parts_df = spark.createDataFrame([(str(part),) for part in parts], "path string")
    parts_df = parts_df.repartition(min(len(parts), 4 * spark.sparkContext.defaultParallelism))
    counts = sum_counts(parts_df.mapInArrow(count_parts, "counts array<long>"))
    if not len(counts):
        raise LcSparkError("The train split has no rows: check 'split' in the config.")
    return by_field(counts[1:], field_map, int(counts[0]))


def psi(expected: Counts, found: Counts) -> float:
    """Return the population stability index of two counts over the same groups.

    The sum of (p - q) ln(p / q) over the groups: 0 for equal shares, and the same both ways.
    """
    p = np.maximum(expected / expected.sum(), SMALLEST_SHARE)
    q = np.maximum(found / found.sum(), SMALLEST_SHARE)
    return float(np.sum((p - q) * np.log(p / q)))


def psi_by_chance(expected: Counts, found: Counts) -> float:
    """Return the mean of the index where both are samples of one population.

    Yurdakul (2018), Statistical Properties of Population Stability Index: divided by 1/n + 1/m it
    is chi-squared, with one degree of freedom less than there are groups.
    """
    groups = int(np.count_nonzero(expected + found))
    return (groups - 1) * (1 / int(expected.sum()) + 1 / int(found.sum()))


def compare(train: FieldCounts, scored: FieldCounts, field_map: FieldMap) -> list[FieldDrift]:
    """Return the drift of every field of the model, the largest index first."""
    drifts = []
    for info in field_map.fields:
        before, now = train.groups[info.name], scored.groups[info.name]
        unseen = OUT_OF_VOCABULARY if info.has_vocabulary else None
        drifts.append(
            FieldDrift(
                info.name,
                info.kind,
                psi(before, now),
                psi_by_chance(before, now),
                *(float(counts[MISSING] / counts.sum()) for counts in (before, now)),
                *(_share(counts, unseen) for counts in (before, now)),
            )
        )
    return sorted(drifts, key=lambda drift: -drift.psi)


def _share(counts: Counts, group: int | None) -> float | None:
    return None if group is None else float(counts[group] / counts.sum())


def drifted(drifts: Sequence[FieldDrift], threshold: float) -> list[FieldDrift]:
    """Return the fields whose index is above the threshold by more than chance would make it."""
    return [drift for drift in drifts if drift.psi - drift.chance > threshold]
