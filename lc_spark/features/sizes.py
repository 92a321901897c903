"""Turns a sample of train rows into the field map that all of them are likely to give.

The sample is encoded as the rows would be, and only the vocabularies are estimated (distinct.py);
the sizes of continuous and hashed fields are known, those of buckets follow from the sample.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyspark.sql import DataFrame

from lc_spark.distinct import Estimate, often_enough
from lc_spark.encoder import Vocabulary, cross_keys, encode
from lc_spark.features.discretize import cut_points
from lc_spark.features.prepare import column_types, prepared_column
from lc_spark.field_kinds import AnyField, Bucketed, Continuous, Crossed, Multivalued
from lc_spark.field_map import OUT_OF_VOCABULARY, FieldInfo, FieldMap

Counted = tuple[NDArray[Any], NDArray[np.int64]]  # distinct values, and in how many rows each is


@dataclass(frozen=True)
class PlannedFields:
    """The field map to expect, and the estimate behind the size of each vocabulary."""

    field_map: FieldMap
    vocabularies: dict[str, Estimate]
    sample_rows: int
    train_rows: int

    def d_between(self) -> tuple[int, int]:
        """Return the bounds of d, were all vocabularies at their lower or all at their upper."""
        off = [(e.low - e.value, e.high - e.value) for e in self.vocabularies.values()]
        d = self.field_map.d
        return round(d + sum(low for low, _ in off)), round(d + sum(high for _, high in off))


def plan_fields(sample_df: DataFrame, fields: Sequence[AnyField], train_rows: int) -> PlannedFields:
    """Estimate the field map of train_rows rows from a random sample of them (rows of ``raw``).

    Collects 8 bytes a field and row. Values that all rows will have less than min_count times
    cannot be told by the sample alone: to a cross a parent's value is rare when its count in the
    sample, times all rows over those of the sample, is below min_count.
    """
    types = column_types(sample_df, fields)
    plain = [f for f in fields if not isinstance(f, Crossed)]
    unsized = [_unsized(field, types[field.column]) for field in plain]
    table = sample_df.select(*[prepared_column(info) for info in unsized]).toArrow()
    n = table.num_rows
    times = train_rows / n if n else 1.0
    words: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
    estimates: dict[str, Estimate] = {}
    infos: list[FieldInfo] = []
    for field, info in zip(plain, unsized, strict=True):
        if isinstance(field, Bucketed):
            info = _bucketed(info, field, table[field.name])
        elif not isinstance(field, Continuous) and field.hashed is None:
            values, counts = _counted(table[field.name], isinstance(field, Multivalued))
            estimates[field.name] = often_enough(counts, times, field.min_count)
            kept = values[counts * times >= field.min_count]
            indices = OUT_OF_VOCABULARY + 1 + np.arange(len(kept), dtype=np.int32)
            words[field.name] = (kept, indices)
            info = dataclasses.replace(info, size=2 + len(kept))
        infos.append(info)
    sample_map = FieldMap(tuple(infos))
    arrays = {name: table[name].combine_chunks() for name in table.column_names}
    encoded = encode(arrays, sample_map, Vocabulary(words))
    sizes = {name: 2 + round(estimate.value) for name, estimate in estimates.items()}
    sizes = {info.name: sizes.get(info.name, info.size) for info in infos}
    for cross in (f for f in fields if isinstance(f, Crossed)):
        info = FieldInfo(cross.name, "crossed", (cross.hashed or 0) + 1, of=cross.of)
        info = dataclasses.replace(info, hashed=cross.hashed)
        infos.append(info)
        if cross.hashed is None:
            keys, counts = np.unique(cross_keys(info, encoded, sample_map), return_counts=True)
            most = math.prod(sizes[parent] for parent in cross.of)
            estimate = often_enough(counts[keys > 0], times, cross.min_count)
            estimates[cross.name] = _at_most(estimate, most)
        sizes[cross.name] = info.size
    sized = [
        dataclasses.replace(info, size=2 + round(estimates[info.name].value))
        if info.name in estimates
        else info
        for info in infos
    ]
    return PlannedFields(FieldMap(tuple(sized)), estimates, n, train_rows)


def _unsized(field: AnyField, column_type: str) -> FieldInfo:
    assert not isinstance(field, Crossed), "crosses are made of encoded fields"
    hashed = None if isinstance(field, Bucketed | Continuous) else field.hashed
    return FieldInfo(
        field.name,
        field.kind,
        size=2 if isinstance(field, Continuous) else (hashed or 0) + 1,
        column=field.column,
        column_type=column_type,
        hashed=hashed,
        delimiter=field.delimiter if isinstance(field, Multivalued) else None,
        max_values=field.max_values if isinstance(field, Multivalued) else 1,
    )


def _bucketed(info: FieldInfo, field: Bucketed, column: pa.ChunkedArray) -> FieldInfo:
    numbers = pc.fill_null(column, math.nan).to_numpy()
    finite = numbers[np.isfinite(numbers)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (None, None)
    shares = [i / field.buckets for i in range(1, field.buckets)] or [0.5]
    by_quantile = field.by == "quantile" and len(finite) > 0
    quantiles = np.quantile(finite, shares).tolist() if by_quantile else []
    cuts = cut_points(field, low, high, quantiles)
    return dataclasses.replace(info, size=len(cuts) + 2, cut_points=cuts)


def _counted(column: pa.ChunkedArray, is_list: bool) -> Counted:
    """Return the distinct hashes and the number of rows that each occurs in."""
    if not is_list:
        hashes = column.drop_null().to_numpy()
        values, counts = np.unique(hashes, return_counts=True)
        return values, counts
    lists = column.combine_chunks()
    rows = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
    values, codes = np.unique(
        pc.list_flatten(lists).to_numpy(zero_copy_only=False), return_inverse=True
    )
    pairs = np.unique(rows.astype(np.int64) * max(len(values), 1) + codes)
    return values, np.bincount(pairs % max(len(values), 1), minlength=len(values))


def _at_most(estimate: Estimate, most: int) -> Estimate:
    return Estimate(*(min(x, float(most)) for x in dataclasses.astuple(estimate)))
