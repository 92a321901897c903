"""Adds up the counts of values that a Python task meets, so that it passes each on only once."""

from collections.abc import Iterator, Sequence

import pyarrow as pa

MOST_RECORDS = 1_000_000  # of a batch on its way to the JVM


class Counts:
    """Counts of values by field, added up from time to time."""

    def __init__(self) -> None:
        self.parts: dict[str, list[pa.Table]] = {}
        self.merged: dict[str, int] = {}  # distinct values when they were last added up

    @property
    def size(self) -> int:
        """Number of values held, those that are yet to be added up included."""
        return sum(part.num_rows for parts in self.parts.values() for part in parts)

    def add(self, name: str, values: pa.Array, counts: pa.Array) -> None:
        """Add counts [n] of values [n]."""
        parts = self.parts.setdefault(name, [])
        parts.append(pa.table([values, counts], ["value", "count"]))
        if sum(part.num_rows for part in parts) > 2 * self.merged.get(name, 0):
            self.parts[name] = [_added_up(parts)]
            self.merged[name] = self.parts[name][0].num_rows

    def give(self) -> Iterator[pa.RecordBatch]:
        """Yield all counts as (field, value, count), and hold none."""
        for name, parts in self.parts.items():
            for batch in _added_up(parts).to_batches(MOST_RECORDS):
                field = pa.repeat(name, batch.num_rows)
                arrays = [field, batch.column("value"), batch.column("count")]
                yield pa.RecordBatch.from_arrays(arrays, names=["field", "value", "count"])
        self.parts, self.merged = {}, {}


def _added_up(parts: Sequence[pa.Table]) -> pa.Table:
    if len(parts) == 1:
        return parts[0].combine_chunks()
    # One chunk: a batch then has as many rows as asked for.
    summed = pa.concat_tables(parts).group_by("value").aggregate([("count", "sum")])
    return summed.rename_columns(
        ["count" if name == "count_sum" else name for name in summed.column_names]
    ).combine_chunks()
