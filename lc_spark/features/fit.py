"""Turns the train rows into a FieldMap, a Vocabulary and the table of all levels."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from lc_spark.encoder import Vocabulary
from lc_spark.errors import LcSparkError
from lc_spark.features import levels
from lc_spark.features import vocabulary as vocab
from lc_spark.features.discretize import fit_numeric, refuse_fractions
from lc_spark.features.prepare import column_types
from lc_spark.field_kinds import AnyField, Bucketed, Categorical, Continuous, Crossed, Multivalued
from lc_spark.field_map import FieldInfo, FieldMap


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What fit_features learnt; levels_df has (field, index, value, hash, count), d rows."""

    field_map: FieldMap
    vocabulary: Vocabulary
    levels_df: DataFrame


@dataclasses.dataclass(frozen=True)
class Grown:
    """What an earlier fit learnt, to be grown; levels_df is its own, of Delta ``vocabulary``."""

    field_map: FieldMap
    levels_df: DataFrame


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
    n_rows = train_df.count()
    if n_rows == 0:
        raise LcSparkError(
            "The train split has no rows: check 'split' in the config and, since rows of one id "
            "stay together, source.row_id."
        )
    valued = [f for f in fields if isinstance(f, Categorical | Multivalued)]
    refuse_fractions(train_df, valued, types)
    numbers = [f for f in fields if isinstance(f, Bucketed | Continuous)]
    if old is None:
        numeric = fit_numeric(train_df, numbers, types, n_rows, seed)
    else:
        numeric = [old.field_map[f.name] for f in numbers]
    cuts = {f.name: f.min_count for f in fields if not isinstance(f, Bucketed | Continuous)}
    texts = [_text_info(f, types) for f in valued]
    ranked_df, words, texts = _fit_values(train_df, texts, cuts, old, recent_df)
    by_name = {info.name: info for info in (*numeric, *texts)}
    base = FieldMap(tuple(by_name[f.name] for f in fields if f.name in by_name))
    crosses = [_cross_info(f) for f in fields if isinstance(f, Crossed)]
    keys_df, ranked_keys_df, words, crosses = _fit_crosses(
        train_df, crosses, base, words, cuts, old, recent_df
    )
    parent = "" if old is None else old.field_map.fingerprint
    field_map = FieldMap((*base.fields, *crosses), parent=parent)

    value_levels_df = ranked_df.unionByName(
        levels.plain_levels(train_df, field_map, keys_df, n_rows)
    )
    value_levels_df = value_levels_df.withColumn("value", levels.name_column())
    levels_df = value_levels_df.unionByName(
        levels.cross_levels(ranked_keys_df, value_levels_df, field_map)
    )
    return Fitted(field_map, words, levels_df)


def _fit_values(
    train_df: DataFrame,
    infos: list[FieldInfo],
    cuts: Mapping[str, int],
    old: Grown | None,
    recent_df: DataFrame | None,
) -> tuple[DataFrame, Vocabulary, list[FieldInfo]]:
    """Fit categorical and multivalued fields: ranked values, vocabulary, infos with sizes."""
    counted = [info for info in infos if info.hashed is None]
    counts_df = vocab.count_values(train_df, counted).persist(StorageLevel.DISK_ONLY)
    given = _given(old, counted)
    if recent_df is not None:
        seen_df = vocab.count_values(recent_df, counted).select("field", F.xxhash64("value"))
        given = vocab.Given(seen_df=seen_df.toDF("field", "hash").distinct())
    value_cuts = {info.name: cuts[info.name] for info in counted} or {"": 1}
    ranked_df = vocab.rank_values(counts_df, value_cuts, given).persist(StorageLevel.DISK_ONLY)
    words, sizes = vocab.to_vocabulary(ranked_df, counted)
    return ranked_df, words, [_sized(info, sizes, words) for info in infos]


def _fit_crosses(
    train_df: DataFrame,
    infos: list[FieldInfo],
    base: FieldMap,
    words: Vocabulary,
    cuts: Mapping[str, int],
    old: Grown | None,
    recent_df: DataFrame | None,
) -> tuple[DataFrame, DataFrame, Vocabulary, list[FieldInfo]]:
    """Fit crosses: counts of their keys and of base's indices, ranked keys, all words, infos."""
    for info in infos:
        check_cross_fits(info, base)
    ranked = [info for info in infos if info.hashed is None]
    counted_map = FieldMap((*base.fields, *(i for i in infos if i.hashed is not None)))
    keys_df = vocab.count_indices(train_df, counted_map, words, ranked)
    keys_df = keys_df.persist(StorageLevel.DISK_ONLY)
    given = _given(old, ranked, base)
    if recent_df is not None:
        seen_df = vocab.count_indices(recent_df, counted_map, words, ranked)
        given = vocab.Given(seen_df=seen_df.select("field", F.col("key").alias("hash")))
    cross_cuts = {info.name: cuts[info.name] for info in ranked} or {"": 1}
    ranked_df = vocab.rank_keys(keys_df, cross_cuts, given).persist(StorageLevel.DISK_ONLY)
    held = sum(len(hashes) for hashes, _ in words.entries.values())
    cross_words, sizes = vocab.to_vocabulary(ranked_df, ranked, held)
    all_words = Vocabulary({**words.entries, **cross_words.entries})
    return keys_df, ranked_df, all_words, [_sized(info, sizes, all_words) for info in infos]


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


def _given(
    old: Grown | None, infos: Sequence[FieldInfo], base: FieldMap | None = None
) -> vocab.Given:
    """Return the indices that an old fit gave to fields; of crosses, by the keys in the new base.

    A cross key is made of its parents' indices with their sizes as radices, which have grown.
    """
    if old is None or not infos:
        return vocab.FRESH
    names = [info.name for info in infos]
    known_df = old.levels_df.where(F.col("field").isin(names) & F.col("hash").isNotNull())
    if base is not None:
        keys = [
            F.when(F.col("field") == info.name, _new_key(info, old.field_map, base))
            for info in infos
        ]
        known_df = known_df.withColumn("hash", F.coalesce(*keys))
    sizes = {name: old.field_map[name].size for name in names}
    return vocab.Given(known_df.select("field", "index", "value", "hash"), sizes)


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


def _sized(info: FieldInfo, sizes: dict[str, int], words: Vocabulary) -> FieldInfo:
    if info.hashed is not None:
        return info
    digest = words.digest(info.name)
    return dataclasses.replace(info, size=sizes[info.name], vocabulary_digest=digest)
