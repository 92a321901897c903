"""Reckons what a vocabulary takes, and refuses one that this machine cannot hold."""

from collections.abc import Mapping, Sequence

import psutil
from pyspark.sql import SparkSession

from lc_spark.errors import LcSparkError
from lc_spark.features.totals import MIN_COUNTS, Sums

# Bytes a value. A vocabulary is a hash (8) and an index (4). Collecting holds what Spark sends
# (field's number, hash, count, known index: 24), that in one piece and in order (24 each), where
# texts begin (16) and the order (8). A Python worker holds the vocabulary and, while it reads it,
# what it reads it from.
COLLECTING, HELD, IN_A_WORKER = 96, 12, 24
TEXTS = 3  # times that a text is held: as Spark sends it, in one piece, in order
NAMED = 3  # fields that the error names


def bytes_a_value(tasks: int) -> int:
    """Return what a value takes, where so many tasks share the driver's machine."""
    return max(COLLECTING, HELD + IN_A_WORKER * tasks)


def refuse_too_many(
    spark: SparkSession, sums: Mapping[str, Sums], held: int, free: int | None
) -> None:
    """Raise LcSparkError when a vocabulary does not fit.

    sums tell by field what is to be kept, held is the number of values which there are already,
    free is in bytes, by default this machine's.
    """
    context = spark.sparkContext
    local = str(context.master).startswith("local")
    counted = {name: found.kept for name, found in sums.items() if found.kept}
    texts = sum(found.bytes for found in sums.values())
    values = sum(counted.values())
    each = bytes_a_value(context.defaultParallelism if local else 0)
    each += TEXTS * -(-texts // max(values, 1))
    free = psutil.virtual_memory().available if free is None else free
    most = free // each - held
    if not values or values <= most:
        return
    largest = sorted(counted, key=lambda name: (-counted[name], name))
    chosen: list[str] = []
    while values - sum(counted[name] for name in chosen) > most and len(chosen) < len(largest):
        chosen.append(largest[len(chosen)])
    rest = values - sum(counted[name] for name in chosen)
    few = ", ".join(f"'{name}' {counted[name]:,}" for name in largest[: max(NAMED, len(chosen))])
    advice = [f"{name}: hashed: {_power_of_two(counted[name])}" for name in chosen]
    min_count = _min_count([sums[name] for name in chosen], most - rest)
    raised = f", or raise min_count there to {min_count}" if min_count else ""
    raise LcSparkError(
        f"The vocabulary of {values + held:,} values needs {(values + held) * each / 1e9:,.2f} GB "
        f"({each} bytes a value in the driver and its tasks), and {free / 1e9:,.2f} GB of this "
        f"machine's memory are free. The fields with most values: {few}. Set {'; '.join(advice)}"
        f"{raised}."
    )


def _power_of_two(n: int) -> int:
    """Return the largest power of two up to n / 2: half the values or more share an index."""
    return 1 << max((n // 2).bit_length() - 1, 0)


def _min_count(fields: Sequence[Sums], most: int) -> int | None:
    """Return the lowest of MIN_COUNTS that leaves the fields no more than so many values."""
    left = [sum(column) for column in zip(*(sums.often for sums in fields), strict=True)]
    return next((cut for cut, n in zip(MIN_COUNTS, left, strict=True) if n <= most), None)
