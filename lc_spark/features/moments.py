"""Counts, ranges, means and deviations of numbers, read in Python tasks from the files of ``raw``.

As five aggregates a field Spark took a microsecond a value for them, most of ``features`` where
there are a thousand such fields.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from lc_spark.features.direct import numbers, pieces, taken
from lc_spark.field_map import FieldInfo
from lc_spark.tables import FILE, ROW

# Of a field: values that are no NaN, and of the finite ones number, least, greatest, mean, sum of
# squared distances to the mean.
PRESENT, N, LOW, HIGH, MEAN, SQUARES = range(6)
NOTHING = (0.0, 0.0, math.inf, -math.inf, 0.0, 0.0)


def moments(df: DataFrame, infos: Sequence[FieldInfo]) -> dict[str, Any]:
    """Return "present x" and, over finite values, "min x", "max x", "mean x" and "sd x".

    infos are number fields that can be read here (``direct_fields``), x their names; None where
    there is no finite value.
    """
    if not infos:
        return {}

    def of_task(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        total = np.tile(NOTHING, (len(infos), 1))
        for piece in pieces(batches, infos):
            assert piece.group is not None, "all fields are direct"
            columns = [taken(piece.group.columns[info.column], piece.rows) for info in infos]
            total = _together(total, np.array([_of(column) for column in columns]))
        yield pa.RecordBatch.from_pydict({"moments": pa.array([total.tobytes()], pa.binary())})

    parts = df.select(F.col(FILE), F.col(ROW)).mapInArrow(of_task, "moments binary").collect()
    total = np.tile(NOTHING, (len(infos), 1))
    for part in parts:
        total = _together(total, np.frombuffer(part["moments"]).reshape(total.shape))
    found: dict[str, Any] = {}
    for info, line in zip(infos, total.tolist(), strict=True):
        n, low, high, mean = line[N : MEAN + 1]
        values = (low, high, mean, math.sqrt(line[SQUARES] / n)) if n else (None,) * 4
        found[f"present {info.name}"] = int(line[PRESENT])
        found |= {
            f"{k} {info.name}": v for k, v in zip(("min", "max", "mean", "sd"), values, strict=True)
        }
    return found


def _of(column: pa.Array) -> tuple[float, ...]:
    """Return the moments of a column."""
    values = pc.fill_null(numbers(column), math.nan).to_numpy(zero_copy_only=False)
    finite = values[np.isfinite(values)]
    present = len(values) - int(np.isnan(values).sum())
    if not len(finite):
        return (present, *NOTHING[1:])
    mean = finite.mean()
    squares = np.square(finite - mean).sum()
    return present, len(finite), finite.min(), finite.max(), mean, squares


def _together(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the moments [fields, 6] of two sets of rows as one (Chan, Golub, LeVeque 1979)."""
    n = one[:, N] + other[:, N]
    share = other[:, N] / np.maximum(n, 1)
    apart = other[:, MEAN] - one[:, MEAN]
    both = one + other  # of what is a sum
    both[:, LOW] = np.minimum(one[:, LOW], other[:, LOW])
    both[:, HIGH] = np.maximum(one[:, HIGH], other[:, HIGH])
    both[:, MEAN] = one[:, MEAN] + apart * share
    with np.errstate(over="ignore", invalid="ignore"):  # fit_numeric refuses what comes of it
        both[:, SQUARES] += apart**2 * one[:, N] * share
    return both
