"""Turns the train rows into a FieldMap, a Vocabulary and all levels with their names."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from lc_spark.encoder import Vocabulary
from lc_spark.errors import LcSparkError
from lc_spark.features.counts import buckets_for, bundled
from lc_spark.features.discretize import fit_numeric, refuse_fractions, summary
from lc_spark.features.levels import Levels
from lc_spark.features.prepare import column_types
from lc_spark.features.ranking import (
    FIRST,
    FRESH,
    Given,
    Ranked,
    counts_by_index,
    rank,
    to_vocabulary,
)
from lc_spark.features.vocabulary import count_indices, count_values
from lc_spark.field_kinds import AnyField, Bucketed, Categorical, Continuous, Crossed, Multivalued
from lc_spark.field_map import FieldInfo, FieldMap


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What fit_features learnt."""

    field_map: FieldMap
    vocabulary: Vocabulary
    levels: Levels


@dataclasses.dataclass(frozen=True)
class Grown:
    """What an earlier fit learnt, to be grown; levels_df is its own, of Delta ``vocabulary``."""

    field_map: FieldMap
    levels_df: DataFrame


@dataclasses.dataclass(frozen=True)
class _Counting:
    """Which values are counted, and when one gets an index; as given to fit_features."""

    train_df: DataFrame
    cuts: Mapping[str, int]  # min_count by field
    buckets: int
    old: Grown | None
    recent_df: DataFrame | None


def fit_features(
    train_df: DataFrame,
    fields: Sequence[AnyField],
    seed: int,
    old: Grown | None = None,
    recent_df: DataFrame | None = None,
) -> Fitted:
    """Fit all fields on the train rows alone (rows of ``raw``, with row_id).

    Crosses come last in the map, after the fields that they are made of. With an old fit cut
    points, means and every index stay as they are, and values that it does not know come after. Of
    recent_df, a part of the train rows, a value must occur there to get an index.
    Raises LcSparkError on an empty split, a missing column or a type that a kind cannot take, and
    when the old fit is of other fields.
    """
    types = column_types(train_df, fields)
    if old is not None:
        _check_same(fields, old.field_map)
    valued = [f for f in fields if isinstance(f, Categorical | Multivalued)]
    numbers = [f for f in fields if isinstance(f, Bucketed | Continuous)]
    found = summary(train_df, fields, types)
    if found["rows"] == 0:
        raise LcSparkError(
            "The train split has no rows: check 'split' in the config and, since rows of one id "
            "stay together, source.row_id."
        )
    refuse_fractions(found, valued)
    if old is None:
        numeric = fit_numeric(train_df, found, numbers, types, seed)
    else:
        numeric = [old.field_map[f.name] for f in numbers]
    cuts = {f.name: f.min_count for f in fields if not isinstance(f, Bucketed | Continuous)}
    counting = _Counting(train_df, cuts, buckets_for(found["rows"] * len(cuts)), old, recent_df)
    values, words, texts = _fit_values(counting, [_text_info(f, types) for f in valued])
    by_name = {info.name: info for info in (*numeric, *texts)}
    base = FieldMap(tuple(by_name[f.name] for f in fields if f.name in by_name))
    crosses = [_cross_info(f) for f in fields if isinstance(f, Crossed)]
    keys, key_words, counts, crosses = _fit_crosses(counting, crosses, base, words)
    for info in numeric:
        if info.kind == "continuous":
            present = found[f"present {info.name}"]
            counts[info.name] = np.array([found["rows"] - present, present])
    parent = "" if old is None else old.field_map.fingerprint
    field_map = FieldMap((*base.fields, *crosses), parent=parent)
    words = Vocabulary({**words.entries, **key_words.entries})
    return Fitted(field_map, words, Levels(field_map, {**values, **keys}, counts))


def _fit_values(
    counting: _Counting, infos: list[FieldInfo]
) -> tuple[dict[str, Ranked], Vocabulary, list[FieldInfo]]:
    """Fit categorical and multivalued fields: ranked values, vocabulary, infos with sizes."""
    counted = [info for info in infos if info.hashed is None]
    if not counted:
        return {}, Vocabulary({}), infos
    buckets, given = counting.buckets, _given(counting, counted)
    if counting.recent_df is not None:
        given = Given(seen_df=count_values(counting.recent_df, counted, buckets, "seen"))
    cuts = {info.name: counting.cuts[info.name] for info in counted}
    ranked = rank(count_values(counting.train_df, counted, buckets), cuts, given)
    words = to_vocabulary(ranked)
    return ranked, words, _sized(infos, ranked, words)


def _fit_crosses(
    counting: _Counting, infos: list[FieldInfo], base: FieldMap, words: Vocabulary
) -> tuple[dict[str, Ranked], Vocabulary, dict[str, NDArray[np.int64]], list[FieldInfo]]:
    """Fit crosses: ranked keys and their vocabulary, counts of the indices of fields without one,
    infos with sizes.
    """
    for info in infos:
        check_cross_fits(info, base)
    ranked = [info for info in infos if info.hashed is None]
    counted_map = FieldMap((*base.fields, *(i for i in infos if i.hashed is not None)))
    plain = [i for i in counted_map.fields if i.kind == "bucketed" or i.hashed is not None]
    if not plain and not ranked:
        return {}, Vocabulary({}), {}, infos
    asked = (counted_map, words, ranked, counting.buckets)
    keys_df = count_indices(counting.train_df, *asked).persist(StorageLevel.DISK_ONLY)
    given = _given(counting, ranked, base)
    if counting.recent_df is not None:
        given = Given(seen_df=count_indices(counting.recent_df, *asked, "seen"))
    cuts = {info.name: counting.cuts[info.name] for info in ranked}
    held = sum(len(hashes) for hashes, _ in words.entries.values())
    keys = rank(keys_df, cuts, given, held)
    counts = counts_by_index(keys_df, {info.name: info.size for info in plain})
    keys_df.unpersist()
    key_words = to_vocabulary(keys)
    return keys, key_words, counts, _sized(infos, keys, key_words)


def _check_same(fields: Sequence[AnyField], old_map: FieldMap) -> None:
    """Refuse to grow the field map of other fields than those of the config."""
    asked = {}
    for f in fields:
        column = "" if isinstance(f, Crossed) else f.column
        asked[f.name] = (f.kind, column, f.of if isinstance(f, Crossed) else ())
    found = {info.name: (info.kind, info.column, info.of) for info in old_map.fields}
    hashed = {f.name: getattr(f, "hashed", None) for f in fields}
    differing = [name for name in {**asked, **found} if asked.get(name) != found.get(name)]
    differing += [n for n, h in hashed.items() if n in found and h != old_map[n].hashed]
    if differing:
        raise LcSparkError(
            f"refresh.mode is append, but the field '{differing[0]}' differs from that of the "
            "field map which is to grow: set refresh.mode to scratch once (--set "
            "refresh.mode=scratch)."
        )


def _given(counting: _Counting, infos: Sequence[FieldInfo], base: FieldMap | None = None) -> Given:
    """Return the indices that an old fit gave to fields; of crosses, by the keys in the new base.

    A cross key is made of its parents' indices with their sizes as radices, which have grown.
    """
    old = counting.old
    if old is None or not infos:
        return FRESH
    names = [info.name for info in infos]
    known_df = old.levels_df.where(F.col("field").isin(names) & F.col("hash").isNotNull())
    if base is not None:
        keys = [
            F.when(F.col("field") == info.name, _new_key(info, old.field_map, base))
            for info in infos
        ]
        known_df = known_df.withColumn("hash", F.coalesce(*keys))
    texts = ["value"] if base is None else []
    known_df = known_df.select("field", F.col("index").alias("known"), "hash", *texts)
    return Given(bundled(known_df, counting.buckets))


def _new_key(info: FieldInfo, old_map: FieldMap, base: FieldMap) -> Column:
    """Return the key of a cross in another base than that of the column `hash`."""
    rest: Column = F.col("hash")
    key: Column = F.lit(0).cast("long")
    place = 1
    for parent in reversed(info.of):
        size = F.lit(old_map[parent].size).cast("long")
        key = key + (rest % size) * F.lit(place).cast("long")
        rest = F.call_function("div", rest, size)  # of whole numbers; / would go through doubles
        place *= base[parent].size
    return key


def check_cross_fits(info: FieldInfo, field_map: FieldMap) -> None:
    """Refuse a cross with more combinations than int64 keys can tell apart."""
    combinations = math.prod(field_map[parent].size for parent in info.of)
    if combinations >= 2**63:
        raise LcSparkError(
            f"The cross '{info.name}' has {combinations:.1e} combinations, more than 2^63: raise "
            "min_count of its parents or cross fewer fields."
        )


def _text_info(field: Categorical | Multivalued, types: dict[str, str]) -> FieldInfo:
    return FieldInfo(
        field.name,
        field.kind,
        size=(field.hashed or 0) + 1,
        column=field.column,
        column_type=types[field.column],
        hashed=field.hashed,
        delimiter=field.delimiter if isinstance(field, Multivalued) else None,
        max_values=field.max_values if isinstance(field, Multivalued) else 1,
    )


def _cross_info(field: Crossed) -> FieldInfo:
    size = (field.hashed or 0) + 1
    return FieldInfo(field.name, "crossed", size=size, of=field.of, hashed=field.hashed)


def _sized(infos: list[FieldInfo], ranked: dict[str, Ranked], words: Vocabulary) -> list[FieldInfo]:
    """Return the fields with the sizes and digests of their vocabularies, where they have one."""
    return [
        dataclasses.replace(
            info,
            size=FIRST + len(ranked[info.name].hashes),
            vocabulary_digest=words.digest(info.name),
        )
        if info.name in ranked
        else info
        for info in infos
    ]
