"""Turns the train rows into a small sample of coded rows for cross_gain, in one pass of Spark.

Fields are coded as fit_features would code them on the sample alone, but in numpy: a sample fits
into memory, and a tenth of the time goes where Spark would count, rank and look up.
"""

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.features.cross_gain import FOLDS, Codes, Sample, dense_codes, with_cross
from lc_spark.features.discretize import cut_points
from lc_spark.features.prepare import column_types, prepared_column
from lc_spark.field_kinds import Bucketed, Categorical, Crossed
from lc_spark.field_map import MISSING, FieldInfo


def draw_sample(train_df: DataFrame, config: Config) -> tuple[list[str], Sample]:
    """Return names and codes of fields on about features.sample_rows rows of ``raw``.

    Names and codes of the categorical and bucketed fields, in the order of the config; behind them,
    without a name, the codes of the listed crosses: a pair is to say more than those do. Rows are
    chosen by a seeded hash of their id, lie in its order, and are collected: 8 bytes a field and
    row. Raises LcSparkError on an empty split or a column that does not fit its field.
    """
    singles = [f for f in config.fields if isinstance(f, Categorical | Bucketed)]
    types = column_types(train_df, singles)
    n_rows = train_df.count()
    if n_rows == 0:
        raise LcSparkError("The train split has no rows: check 'split' in the config.")
    infos = [
        FieldInfo(f.name, f.kind, size=0, column=f.column, column_type=types[f.column])
        for f in singles
    ]
    key = F.xxhash64(F.lit(f"crosses {config.seed}"), "row_id")
    sample_df = train_df.where(F.pmod(key, F.lit(n_rows)) < config.features.sample_rows)
    columns = [prepared_column(info) for info in infos]
    table = sample_df.select(key.alias("__key"), "label", "date", *columns).toArrow()
    # Equal row ids lie in any order, so the label decides between them.
    table = table.sort_by([("__key", "ascending"), ("label", "ascending")])
    keys = table["__key"].to_numpy()
    fold = keys // FOLDS % FOLDS
    days = table["date"].cast(pa.int32()).to_numpy()
    if config.split.by == "date" and len(np.unique(days)) >= FOLDS:
        fold = _blocks_of_days(days)
    coded = [
        _bucket_codes(table[f.name], f)
        if isinstance(f, Bucketed)
        else _value_codes(table[f.name], f)
        for f in singles
    ]
    label = table["label"].to_numpy().astype(np.float64)
    sample = Sample(
        np.stack([codes for codes, _ in coded]), tuple(size for _, size in coded), label, fold
    )
    names = [f.name for f in singles]
    for cross in (f for f in config.fields if isinstance(f, Crossed)):
        sample = with_cross(sample, [names.index(parent) for parent in cross.of])
    return names, sample


def _blocks_of_days(days: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the fold of each row: consecutive days, about as many rows in each fold."""
    _, day, counts = np.unique(days, return_inverse=True, return_counts=True)
    rows_before = np.cumsum(counts) - counts
    blocks: NDArray[np.int64] = (rows_before * FOLDS // len(days))[day]
    return blocks


def _value_codes(column: pa.ChunkedArray, field: Categorical) -> tuple[Codes, int]:
    # 0 stands for missing; no text is likely to have that hash.
    hashes = pc.fill_null(column, 0).to_numpy()
    if field.hashed is not None:
        hashed = (hashes.view(np.uint64) % np.uint64(field.hashed)).astype(np.int64) + 1
        hashes = np.where(hashes == 0, 0, hashed)
    values, codes, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    rare = (counts < field.min_count) & (values != 0) & (field.hashed is None)
    return dense_codes(np.where(rare, -1, np.arange(len(values)))[codes])


def _bucket_codes(column: pa.ChunkedArray, field: Bucketed) -> tuple[Codes, int]:
    numbers = pc.fill_null(column, math.nan).to_numpy()
    finite = numbers[np.isfinite(numbers)]
    if not len(finite):
        return dense_codes(np.where(np.isnan(numbers), MISSING, 1))
    shares = [i / field.buckets for i in range(1, field.buckets)]
    quantiles = np.quantile(finite, shares).tolist() if field.by == "quantile" else []
    cuts = cut_points(field, float(finite.min()), float(finite.max()), quantiles)
    buckets = 1 + np.searchsorted(np.asarray(cuts), numbers, side="right")
    return dense_codes(np.where(np.isnan(numbers), MISSING, buckets))
