"""Turns raw rows in pandas into prepared columns, equal to ``features.prepare`` on the same rows.

What a served model does with a request; ``encoder`` goes on from there.
"""

import datetime
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from lc_spark.errors import LcSparkError
from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.hashing import hash_text


def prepare_pandas(raw: pd.DataFrame, field_map: FieldMap) -> dict[str, pa.Array]:
    """Return what ``encoder.encode`` wants, of raw rows.

    A column that is not there counts as missing in every row. Raises LcSparkError on a value that
    does not fit the type that the column had when the fields were fitted.
    """
    prepared: dict[str, pa.Array] = {}
    for info in field_map.fields:
        if info.kind == "crossed":
            continue
        values = raw[info.column] if info.column in raw else pd.Series([None] * len(raw))
        try:
            if info.kind in ("bucketed", "continuous"):
                prepared[info.name] = pa.array(_as_numbers(values), pa.float64(), from_pandas=True)
            elif info.kind == "categorical":
                hash_of = _hasher(info)
                hashes = [hash_of(value) for value in values.tolist()]
                prepared[info.name] = pa.array(hashes, pa.int64())
            else:
                prepared[info.name] = pa.array(_hashed_lists(values, info), pa.list_(pa.int64()))
        except (ValueError, TypeError, OverflowError) as error:
            number = info.kind in ("bucketed", "continuous")
            wanted = "numbers" if number else f"values of type {info.column_type}"
            raise LcSparkError(f"Column '{info.column}' must hold {wanted}: {error}") from error
    return prepared


def _as_numbers(values: pd.Series) -> NDArray[np.float64]:
    if isinstance(values.dtype, np.dtype) and values.dtype.kind in "iuf":
        return values.to_numpy(np.float64)  # as nearly always; the rest costs some 0.1 ms a column
    return pd.to_numeric(values, errors="raise").to_numpy(np.float64, na_value=math.nan)


def _hashed_lists(values: pd.Series, info: FieldInfo) -> list[list[int]]:
    hash_of = _hasher(info)
    found = ([hash_of(value) for value in _split(texts, info)] for texts in values.tolist())
    return [[value for value in hashes if value is not None] for hashes in found]


def _split(value: Any, info: FieldInfo) -> list[Any]:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return []
    if info.delimiter is not None and isinstance(value, str):
        return value.split(info.delimiter)
    if isinstance(value, list | tuple | np.ndarray):
        return list(value)
    raise ValueError(f"{value!r} is no list of values")


def _hasher(info: FieldInfo) -> Callable[[Any], int | None]:
    """Return what hashes one value of a field, an equal one only once; None where it is missing."""
    element_type = info.column_type.removeprefix("array<").removesuffix(">")
    text = _TEXT_OF.get(element_type, _integer_text)

    @functools.lru_cache(maxsize=None, typed=True)
    def hash_of(value: Any) -> int | None:
        missing = value is None or value is pd.NA or value != value
        return None if missing else hash_text(text(value))

    return hash_of


def _string_text(value: Any) -> str:
    # A number in a string column comes from JSON or from pandas guessing the type.
    return value if isinstance(value, str) else _integer_text(value)


def _integer_text(value: Any) -> str:
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return str(int(value))
    number = float(value)
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"  # as Spark writes it
    return str(int(number)) if number.is_integer() else repr(number)


def _boolean_text(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    raise ValueError(f"{value!r} is not true or false")


def _date_text(value: Any) -> str:
    if isinstance(value, str):
        return datetime.date.fromisoformat(value[:10]).isoformat()
    if not isinstance(value, datetime.date):
        raise ValueError(f"{value!r} is not a date")
    return value.isoformat()[:10]


_TEXT_OF: dict[str, Callable[[Any], str]] = {
    "string": _string_text,
    "boolean": _boolean_text,
    "date": _date_text,
}
