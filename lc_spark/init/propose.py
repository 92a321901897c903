"""Turns a Profile into proposals for a config: the kind of each column, the split, the sizes."""

import datetime
import itertools
import keyword
import math
import re
import unicodedata
from dataclasses import dataclass, replace

from lc_spark.config import RESERVED_NAMES
from lc_spark.init.columns import ColumnProfile
from lc_spark.init.profile import MOST_DAYS, Day, Profile
from lc_spark.rows import OWN

LEAK_AUC, LEAK_LOSS = 0.98, 0.05  # of a column alone; the loss as a share of the label's entropy
SUSPICIOUS_AUC = 0.9
FEWEST_OF_A_CLASS = 20  # below it an AUC says nothing
NEAR_UNIQUE = 0.95
MOST_CODES = 50  # whole numbers with fewer distinct values are codes
FEW_ROWS = 1000  # too few for the buckets of a number
FEWEST_DAYS = 10
# Whole numbers under such names stand for things, and are no amounts.
CODE_NAME = re.compile(
    r"(^|_)((user|item|ad|site|session|device|product|customer|campaign|app|page)?id|uuid|guid|key"
    r"|code|zip|zipcode|postcode|hash|type|category|class)(_|$)"
)


@dataclass(frozen=True)
class Choice:
    """What a column becomes. left_out says why it becomes nothing; kind may then be empty."""

    column: ColumnProfile
    name: str
    kind: str
    settings: dict[str, str | int]
    left_out: str = ""
    warning: str = ""


@dataclass(frozen=True)
class DateSplit:
    """Two days, and the shares of the rows that train, valid and test then get."""

    valid_from: datetime.date
    test_from: datetime.date
    shares: tuple[float, float, float]


@dataclass(frozen=True)
class Sizes:
    """Settings that follow from the number of rows."""

    ranks: int
    epochs: int
    batch_size: int
    steps: int
    hidden: tuple[int, int]
    rows_per_group: int


def choices(profile: Profile) -> list[Choice]:
    """Choose for every column of a profile, in its order."""
    taken: set[str] = set()
    chosen = []
    for column in profile.columns:
        name = field_name(column.name, taken)
        taken.add(name.lower())
        kind, settings = _kind(column, profile.rows)
        choice = Choice(column, name, kind, settings, warning=_warning(column, kind, profile))
        left_out, warning = _left_out(column, profile)
        if left_out:
            choice = replace(choice, left_out=left_out, warning=warning)
        chosen.append(choice)
    return chosen


def field_name(column: str, taken: set[str]) -> str:
    """Return a name that a field may have, near to the column's; taken are lower-case names."""
    plain = unicodedata.normalize("NFKD", column).encode("ascii", "ignore").decode()
    name = re.sub("[^A-Za-z0-9_]+", "_", plain).strip("_") or "column"
    if name[0].isdigit():
        name = f"column_{name}"
    if name.lower() in RESERVED_NAMES or keyword.iskeyword(name):
        name = f"{name}_column"
    numbered = (f"{name}_{i}" for i in itertools.count(2))
    return (
        name if name.lower() not in taken else next(n for n in numbered if n.lower() not in taken)
    )


def row_id(profile: Profile) -> ColumnProfile | None:
    """Return the column that tells rows apart, if one does."""
    unique = [column for column in profile.columns if column.unique]
    unique.sort(key=lambda column: not _like_code(column.name))
    return unique[0] if unique else None


def _like_code(name: str) -> bool:
    words = re.sub("([a-z0-9])([A-Z])", r"\1_\2", name)
    return CODE_NAME.search(re.sub("[^a-z0-9]+", "_", words.lower())) is not None


def _left_out(column: ColumnProfile, profile: Profile) -> tuple[str, str]:
    """Return why a column becomes no field, and a warning where that is for a person to judge."""
    present = profile.rows - profile.corrupt - column.missing
    if column.holds == "other":
        return f"no kind of field takes {column.type}: cast it in the source", ""
    if column.name == used_date(profile):
        return "names a row's day: it is source.date", ""
    if column.holds == "date":
        return "a date: make an hour or a weekday of it in the source", ""
    if column.name.lower() in OWN:
        return "the table 'raw' keeps this name for its own: rename it in the source", ""
    if column.distinct == 0 or (column.distinct == 1 and not column.missing):
        return "constant" if column.distinct else "always missing", ""
    if column.unique:
        return (unique := "another value in every row, as an id has"), unique
    like_id = column.holds == "text" or (not column.fractions and _like_code(column.name))
    if like_id and column.holds != "array" and column.distinct >= NEAR_UNIQUE * present:
        near = "nearly every row has another value, as an id or free text has"
        return near, near
    return (leak := _leak(column, profile)), leak


def _leak(column: ColumnProfile, profile: Profile) -> str:
    alone = column.alone
    if alone is None or min(profile.label.positives, profile.label.negatives) < FEWEST_OF_A_CLASS:
        return ""
    if alone.auc < LEAK_AUC and alone.loss_share > LEAK_LOSS:
        return ""
    return f"alone it gives AUC {alone.auc:.3f}: is it known only after '{profile.label.column}'?"


def _warning(column: ColumnProfile, kind: str, profile: Profile) -> str:
    present = profile.rows - profile.corrupt - column.missing
    few = min(profile.label.positives, profile.label.negatives) < FEWEST_OF_A_CLASS
    if column.alone and column.alone.auc > SUSPICIOUS_AUC and not few:
        return f"alone it gives AUC {column.alone.auc:.3f}: make sure that it is known beforehand"
    if kind == "categorical" and 0 < column.odd_text <= 0.1 * present and column.distinct > 20:
        return f"all but {column.odd_text:,} values read as numbers: clean them for buckets"
    return ""


def _kind(column: ColumnProfile, n_rows: int) -> tuple[str, dict[str, str | int]]:
    """Return the kind of field that suits a column, and its settings."""
    rare = 2 if n_rows < 10_000 else 5 if n_rows < 1_000_000 else 10
    min_count: dict[str, str | int] = {"min_count": rare} if column.distinct > MOST_CODES else {}
    if column.holds in ("date", "other"):
        return "", {}
    if column.holds == "array" or column.delimiter:
        given: dict[str, str | int] = {"delimiter": column.delimiter} if column.delimiter else {}
        min_count = {"min_count": rare} if column.values > MOST_CODES else {}
        return "multivalued", given | {
            "max_values": max(1, min(column.most_values, 32))
        } | min_count
    codes = column.distinct <= MOST_CODES or column.leading_zeros or _like_code(column.name)
    decimal = column.type.startswith("decimal")  # which a categorical field does not take
    if column.holds != "number" or (codes and not column.fractions and not decimal):
        return "categorical", min_count
    low, high = column.low or 0.0, column.high or 0.0
    several = column.distinct > MOST_CODES
    signed = column.fractions and low < 0 < high and abs(column.skewness) < 1
    if several and (n_rows < FEW_ROWS or (signed and column.distinct > n_rows / 2)):
        return "continuous", {}
    if _is_long_tailed_count(column):
        return "bucketed", {"by": "log_squared"}
    buckets = 10 if n_rows < 10_000 else 20 if n_rows < 1_000_000 else 50
    return "bucketed", {"buckets": max(2, min(buckets, column.distinct))}


def _is_long_tailed_count(column: ColumnProfile) -> bool:
    if column.fractions or not column.quantiles or (column.low or 0) < 0:
        return False
    middle, top = column.quantiles[49], column.quantiles[98]
    return top > 10 * max(middle, 1.0)


def date_split(days: tuple[Day, ...]) -> DateSplit | None:
    """Return the split by day nearest to 70 / 10 / 20 % of the rows; None where none is near."""
    if not FEWEST_DAYS <= len(days) <= MOST_DAYS:
        return None
    before = [0, *itertools.accumulate(day.rows for day in days)]
    total = before[-1]

    def start(end: int, first: int, wanted: float) -> int:
        return min(range(first, end), key=lambda i: abs((before[end] - before[i]) / total - wanted))

    test = start(len(days), 2, 0.2)
    valid = start(test, 1, 0.1)
    parts = (days[:valid], days[valid:test], days[test:])
    train_share, valid_share, test_share = (sum(d.rows for d in part) / total for part in parts)
    fits = train_share >= 0.5 and 0.04 <= valid_share <= 0.25 and 0.1 <= test_share <= 0.35
    both = all(0 < sum(d.positives for d in p) < sum(d.rows for d in p) for p in parts)
    if not (fits and both):
        return None
    shares = (train_share, valid_share, test_share)
    return DateSplit(days[valid].day, days[test].day, shares)


def used_date(profile: Profile) -> str | None:
    """Return the column of a row's day, if rows are split by it."""
    return profile.date if date_split(profile.days) else None


def rejected_rows(profile: Profile) -> int:
    """Return how many rows ingest will set aside, at the most."""
    dates = [column.missing for column in profile.columns if column.name == used_date(profile)]
    return profile.corrupt + profile.label.missing + sum(dates)


def max_rejected(profile: Profile) -> float:
    """Return a share of rejected rows that the table as it was seen stays well below."""
    seen = rejected_rows(profile) / profile.rows
    return min(0.99, max(0.05, math.ceil(seen * 120 + 1) / 100 if seen else 0))


def crosses(chosen: list[Choice], n_rows: int) -> list[tuple[str, str]]:
    """Return up to three pairs of small fields, categorical before bucketed, the telling first."""
    small = [
        (c, int(c.settings.get("buckets", c.column.distinct)))
        for c in chosen
        if not c.left_out and c.kind in ("categorical", "bucketed") and c.settings.get("by") is None
    ]
    small = [(c, size) for c, size in small if 2 <= size <= 200]
    auc = {c.name: c.column.alone.auc if c.column.alone else 0.0 for c, _ in small}
    small.sort(key=lambda pair: (pair[0].kind != "categorical", -auc[pair[0].name]))
    pairs = itertools.combinations(small[:4], 2)
    most = max(200, n_rows // 20)
    return [(a.name, b.name) for (a, n), (b, m) in pairs if n * m <= most][:3]


def sizes(n_rows: int, split: DateSplit | None) -> Sizes:
    """Return ranks, epochs and sizes that give a few hundred steps an epoch where rows allow it."""
    train_rows = max(1, int(n_rows * (split.shares[0] if split else 0.7)))
    ranks = 1 if train_rows < 20_000 else 2
    batch_size = 16
    while batch_size < 2048 and train_rows / (ranks * batch_size * 2) >= 300:
        batch_size *= 2
    steps = train_rows // (ranks * batch_size)
    rows_per_group = 256
    while rows_per_group < 32_768 and train_rows / (ranks * rows_per_group * 2) >= 4:
        rows_per_group *= 2
    hidden = (256, 128) if train_rows >= 100_000 else (64, 32)
    return Sizes(ranks, 10 if steps < 300 else 5, batch_size, steps, hidden, rows_per_group)
