"""Ranks counted values into vocabularies: tasks add the counts up, the driver orders what is kept.

A value is told by its 64-bit hash, and a collision of two is an error. The text of a value comes to
the driver only if it is kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyspark.sql import DataFrame

from lc_spark.encoder import Vocabulary
from lc_spark.features.memory import refuse_too_many
from lc_spark.features.totals import Sums, add_up, read_kept, read_sums
from lc_spark.field_map import OUT_OF_VOCABULARY

FIRST = OUT_OF_VOCABULARY + 1  # index of the first value


@dataclass(frozen=True)
class Given:
    """Indices that values have from an earlier fit, and which values are too old to get one."""

    known_df: DataFrame | None = None  # bundles of (field, hash, known): their indices stay
    seen_df: DataFrame | None = None  # of (field, hash, seen): values without get none


FRESH = Given()


@dataclass(frozen=True)
class Ranked:
    """The values of a field in the order of their indices, from 2 on, and the rows without one."""

    hashes: NDArray[np.int64]  # of a cross its keys
    counts: NDArray[np.int64]
    values: pa.Array | None  # texts; None for a cross
    missing: int  # rows of index 0
    other: int  # rows of index 1: of values that were cut


def rank(
    counts_df: DataFrame,
    min_counts: Mapping[str, int],
    given: Given = FRESH,
    held: int = 0,
    free: int | None = None,
) -> dict[str, Ranked]:
    """Rank counted values or keys: count descending, then text (or key) ascending.

    counts_df has bundles, as count_values and count_indices return them; fields that min_counts
    does not name are passed over. Values that are known keep their indices, new ones come after
    them. Raises LcSparkError when two values of a field share a hash, and, before anything is
    collected, when the values need more than the `free` bytes of memory (by default: this
    machine's) beside the `held` ones that there are already.
    """
    if not min_counts:
        return {}
    for more_df in (given.known_df, given.seen_df):
        counts_df = counts_df if more_df is None else counts_df.unionByName(more_df)
    added_df = add_up(counts_df, min_counts, given.seen_df is not None)
    sums = read_sums(added_df, min_counts)
    refuse_too_many(counts_df.sparkSession, sums, held, free)
    kept = read_kept(added_df)
    added_df.unpersist()
    ends = np.searchsorted(kept["field"].to_numpy(), np.arange(len(min_counts) + 1)).tolist()
    slices = zip(min_counts, ends, ends[1:], strict=False)
    return {name: _ranked(kept.slice(at, end - at), sums[name]) for name, at, end in slices}


def counts_by_index(keys_df: DataFrame, sizes: Mapping[str, int]) -> dict[str, NDArray[np.int64]]:
    """Return the rows of each index [size] of fields whose keys are their indices."""
    if not sizes:
        return {}
    added_df = add_up(keys_df, dict.fromkeys(sizes, 1), recent=False)
    sums, kept = read_sums(added_df, sizes), read_kept(added_df)
    added_df.unpersist()
    offsets = np.cumsum([0, *sizes.values()])
    flat = np.zeros(offsets[-1], np.int64)
    flat[offsets[kept["field"].to_numpy()] + kept["hash"].to_numpy()] = kept["count"].to_numpy()
    flat[offsets[:-1]] = [sums[name].missing for name in sizes]
    return dict(zip(sizes, np.split(flat, offsets[1:-1]), strict=True))


def to_vocabulary(ranked: Mapping[str, Ranked]) -> Vocabulary:
    """Return the Vocabulary of ranked values."""
    entries = {}
    for name in sorted(ranked):
        if len(hashes := ranked[name].hashes):
            order = np.argsort(hashes, kind="stable")
            entries[name] = (hashes[order], (order + FIRST).astype(np.int32))
    return Vocabulary(entries)


def _ranked(kept: pa.Table, sums: Sums) -> Ranked:
    """Order the kept values of a field."""
    hashes, counts, known = (kept[name].to_numpy() for name in ("hash", "count", "known"))
    values = kept["value"].combine_chunks() if "value" in kept.column_names else None
    had, new = np.flatnonzero(known >= 0), np.flatnonzero(known < 0)
    if values is None:
        new = new[np.lexsort((hashes[new], -counts[new]))]
    else:
        columns = pa.table({"count": counts[new], "value": values.take(pa.array(new))})
        by = [("count", "descending"), ("value", "ascending")]
        new = new[pc.sort_indices(columns, sort_keys=by).to_numpy()]
    old = np.empty(len(had), np.int64)
    old[known[had] - FIRST] = had
    order = np.concatenate([old, new])
    return Ranked(
        hashes[order],
        counts[order],
        None if values is None else values.take(pa.array(order)),
        sums.missing,
        sums.rows - sums.missing - sums.kept_rows,
    )
