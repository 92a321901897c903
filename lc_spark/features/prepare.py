"""Turns raw columns into prepared ones (64-bit hashes and doubles) with Spark's own functions."""

import re
from collections.abc import Sequence

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from lc_spark.errors import LcSparkError, nearest
from lc_spark.field_kinds import AnyField, Crossed, Multivalued
from lc_spark.field_map import FieldInfo

INTEGERS = ("tinyint", "smallint", "int", "bigint")
FLOATS = ("float", "double")
CATEGORICAL_TYPES = ("string", "boolean", "date", *INTEGERS, *FLOATS)


def column_types(raw_df: DataFrame, fields: Sequence[AnyField]) -> dict[str, str]:
    """Return the Spark type of each field's raw column.

    Raises LcSparkError for a column that the table lacks, or of a type that the kind cannot take.
    """
    known = {column.name: column.dataType for column in raw_df.schema.fields}
    types = {}
    for field in fields:
        if isinstance(field, Crossed):
            continue
        if field.column not in known:
            raise LcSparkError(
                f"Field '{field.name}' reads column '{field.column}', which the table lacks."
                f"{nearest(field.column, known)} It has: {', '.join(known)}"
            )
        _check_type(field, known[field.column])
        types[field.column] = known[field.column].simpleString()
    return types


def _check_type(
    field: AnyField,
    column_type: T.DataType,
) -> None:
    name = column_type.simpleString()
    if field.kind in ("bucketed", "continuous"):
        if not isinstance(column_type, T.NumericType):
            raise LcSparkError(
                f"Field '{field.name}' is {field.kind}, but its column is {name}: it must be a "
                "number."
            )
        return
    if isinstance(field, Multivalued):
        if isinstance(column_type, T.ArrayType):
            name = column_type.elementType.simpleString()
        elif name != "string" or field.delimiter is None:
            raise LcSparkError(
                f"Field '{field.name}' is multivalued, but its column is {name}: it must be an "
                "array, or a string with 'delimiter' set."
            )
    if name not in CATEGORICAL_TYPES:
        raise LcSparkError(
            f"Field '{field.name}' is {field.kind}, but its values are {name}: cast them to a "
            f"string, or take one of {', '.join(CATEGORICAL_TYPES)}."
        )


def text_column(column: Column, type_name: str) -> Column:
    """Return values as text; null for null, NaN and the empty string.

    A whole number reads the same from an integer and a double column ("1545"), since missing
    values turn integers to doubles on their way through pandas.
    """
    text = column.cast("string")
    if type_name in FLOATS:
        whole = (column == F.floor(column)) & (F.abs(column) < 2.0**63)
        text = F.when(whole, column.cast("bigint").cast("string")).when(~F.isnan(column), text)
    return F.nullif(text, F.lit(""))


def texts_column(info: FieldInfo) -> Column:
    """Return a field's values as an array of texts (multivalued) or one text (categorical)."""
    column = F.col(f"`{info.column}`")
    if info.kind == "categorical":
        return text_column(column, info.column_type)
    if info.column_type == "string":
        texts = F.split(column, re.escape(info.delimiter or ""), -1)
        return F.filter(texts, lambda text: text != "")
    element_type = info.column_type.removeprefix("array<").removesuffix(">")
    texts = F.transform(column, lambda value: text_column(value, element_type))
    return F.filter(texts, lambda text: text.isNotNull())


def number_column(name: str) -> Column:
    """Return a numeric raw column as double, NaN as null."""
    number = F.col(f"`{name}`").cast("double")
    return F.when(~F.isnan(number), number)


def prepared_column(info: FieldInfo) -> Column:
    """Return what ``encoder.encode`` wants for a field that is no cross."""
    if info.kind in ("bucketed", "continuous"):
        prepared = number_column(info.column)
    elif info.kind == "categorical":
        text = texts_column(info)
        prepared = F.when(text.isNotNull(), F.xxhash64(text))
    else:
        prepared = F.transform(texts_column(info), lambda text: F.xxhash64(text))
    return prepared.alias(info.name)
