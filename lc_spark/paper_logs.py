"""Makes click logs of the size and shape of the paper's two data sets, in Spark, from a seed alone.

Nothing in them was observed, and nothing of the paper's own data is known but the numbers of its
Table 1 (Chen et al., WWW 2017 Companion): these logs show what such a size costs.
"""

import datetime
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from lc_spark import files
from lc_spark.made_logits import bounded, intercept, sigmoid, together
from lc_spark.synthetic import FIRST_DAY

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

BLOCK_ROWS = 16_384  # drawn together, from a seed of their own: the log hangs on no partitioning
FILE_CELLS = 20_000_000  # values of a file: what a worker holds at once
TRAIN_DAYS, TEST_DAYS = 31, 7
SKEW = 4  # a value's rank is V u^4, u uniform: Zipf with exponent 3/4
SHARED = 100  # a field is an attribute of users or items if these have so many times its values
MISSING = (0.0, 0.0, 0.02, 0.1, 0.3)  # shares of the rows, field after field
SUM_SD = 0.7  # standard deviation of each of the three sums that the logit is made of
SAMPLE_ROWS = 200_000  # those that the rate of clicks is set by
RATE = 0.1  # mean of the true probability
FITTED_COUNT = 2  # d counts the values that occur as often on the train rows: min_count's default


@dataclass(frozen=True)
class Shape:
    """Rows, fields and features of one of the paper's data sets (its Table 1)."""

    train_rows: int
    test_rows: int
    categorical: int
    continuous: int
    d: int

    @property
    def rows(self) -> int:
        """All rows."""
        return self.train_rows + self.test_rows


SHAPES = {
    "appdata": Shape(9_000_000, 2_035_501, 132, 26, 8_672_633),
    "feedsdata": Shape(86_980_291, 23_249_245, 898, 1_413, 8_522_742),
}


class Field(NamedTuple):
    """A categorical field of the log."""

    name: str
    values: int
    missing: float  # share of the rows
    owner: int | None  # 0: an attribute of the user, 1: of the item; None: drawn for each row
    acts: int | None  # which of the three sums its effects are in


@dataclass(frozen=True)
class Plan:
    """All that a block of rows is drawn by."""

    seed: int
    rows: int
    train_rows: int
    owners: tuple[int, int]  # users, items
    fields: tuple[Field, ...]
    continuous: int
    bias: float = 0.0


def write_log(spark: SparkSession, name: str, rows: int, seed: int, folder: str) -> int:
    """Write a log of the shape `name` as Parquet files of a folder; return its number of rows.

    The same rows and seed give the same rows. Columns: impression (row number, int64), date,
    clicked (int8), true_probability, c001 .. (text), n001 .. (double). A log of fewer rows than the
    paper's has d in proportion, counted on the train rows (those of the first 31 days, in the
    paper's proportion) with min_count 2; it comes out within about 1 %. How rows come about:

    - There are users and items, as many as the largest two fields have values. Fields with at most
      a hundredth as many values are attributes of them, the rest is drawn for each row. The rank
      of a value among V is V u^4: Zipf, with exponent 3/4. Sizes ascend geometrically.
    - Two of five fields miss no value, the others 2, 10 and 30 %.
    - Every second field acts. A value's effect is drawn once, uniformly; effects add up to three
      sums of sd 0.7 each (who, what, where), in which every second number n acts too, linearly or
      by 1 - min(n^2, 4).
    - The logit is made of the sums as in ``synthetic`` (with a product and an absolute value, which
      LR cannot learn), and clicked is drawn by it; the mean probability is 0.1.
    """
    plan = plan_log(name, rows, seed)
    target = files.as_path(folder)
    files.remove(target)
    target.mkdir(parents=True)
    blocks = -(-rows // BLOCK_ROWS)
    together = max(1, FILE_CELLS // (BLOCK_ROWS * (len(plan.fields) + plan.continuous)))
    n_files = -(-blocks // together)

    def write(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for file in batch.column("id").to_pylist():
                numbers = range(file * together, min((file + 1) * together, blocks))
                table = pa.Table.from_batches([draw_block(plan, block) for block in numbers])
                # Not by Spark, whose writer goes value by value and takes three times as long.
                with (target / f"part-{file:05d}.parquet").open("wb") as out:
                    pq.write_table(table, out, compression="zstd")
                yield pa.RecordBatch.from_pydict({"rows": [table.num_rows]})

    written_df = spark.range(0, n_files, 1, n_files).mapInArrow(write, "rows long")
    return int(written_df.agg(F.sum("rows")).collect()[0][0])


def plan_log(name: str, rows: int, seed: int) -> Plan:
    """Return what the blocks of a log are drawn by."""
    shape = SHAPES[name]
    train_rows = round(rows * shape.train_rows / shape.rows)
    wanted = (shape.d - 2 * shape.continuous) * rows / shape.rows
    low, high = 2.0, 4.0 * wanted
    for _ in range(40):
        largest = (low * high) ** 0.5
        sizes = _sizes(largest, shape.categorical)
        if sum(_fitted(v, train_rows, _missing(i)) for i, v in enumerate(sizes)) < wanted:
            low = largest
        else:
            high = largest
    owners = (sizes[-1], sizes[-2])
    fields = tuple(
        Field(f"c{i + 1:03d}", v, _missing(i), _owner(i, v, owners), _acts(i))
        for i, v in enumerate(sizes)
    )
    plan = Plan(seed, rows, train_rows, owners, fields, shape.continuous)
    logits = [draw_logits(plan, b)[0] for b in range(-(-min(rows, SAMPLE_ROWS) // BLOCK_ROWS))]
    return Plan(**{**vars(plan), "bias": intercept(np.concatenate(logits), RATE)})


def _sizes(largest: float, n: int) -> list[int]:
    return [round(size) for size in np.geomspace(2, largest, n)]


def _missing(i: int) -> float:
    return MISSING[i % len(MISSING)]


def _owner(i: int, values: int, owners: tuple[int, int]) -> int | None:
    return i % 3 if i % 3 < 2 and values * SHARED <= owners[i % 3] else None


def _acts(i: int) -> int | None:
    return i // 2 % 3 if i % 2 else None


def _fitted(values: int, train_rows: int, missing: float) -> float:
    """Return about how many features a field has: values seen twice, missing and the rest."""
    ranks = np.unique(np.linspace(0, values - 1, min(values, 2000)).round())
    shares = ((ranks + 1) / values) ** (1 / SKEW) - (ranks / values) ** (1 / SKEW)
    seen = train_rows * (1 - missing) * shares
    once_or_never = np.exp(-seen) * (1 + seen)  # Poisson
    return 2 + values * float(1 - np.mean(once_or_never))


class _Block(NamedTuple):
    """A block before its logit is known: codes are ranks, -1 where missing."""

    random: np.random.Generator
    rows: int
    codes: list[Ints]
    numbers: list[Floats]


def _draw_columns(plan: Plan, block: int) -> _Block:
    rows = min(BLOCK_ROWS, plan.rows - block * BLOCK_ROWS)
    random = np.random.Generator(np.random.SFC64([plan.seed, block]))
    owners = [_ranks(random.random(rows), size) for size in plan.owners]
    codes = []
    for i, field in enumerate(plan.fields):
        if field.owner is None:
            code = _ranks(random.random(rows, np.float32), field.values)
        else:
            code = _ranks(_uniform(owners[field.owner], plan.seed, i), field.values)
        if field.missing:
            code[random.random(rows, np.float32) < field.missing] = -1
        codes.append(code)
    # The largest two fields name the user and the item themselves.
    for i, ids in ((len(codes) - 1, owners[0]), (len(codes) - 2, owners[1])):
        codes[i] = np.where(codes[i] < 0, -1, ids)
    numbers = []
    for i in range(plan.continuous):
        number = random.standard_normal(rows)
        number[random.random(rows, np.float32) < _missing(i)] = np.nan
        numbers.append(number)
    return _Block(random, rows, codes, numbers)


def _ranks(uniform: npt.NDArray[Any], values: int) -> Ints:
    squared = np.square(uniform, dtype=np.float64)
    ranks: Ints = np.minimum(squared * squared * values, values - 1).astype(np.int64)
    return ranks


def _uniform(codes: Ints, seed: int, i: int) -> Floats:
    """Return a number in [0, 1) for each code of a field, always the same for the same code."""
    return mixed(codes, seed, i).astype(np.float64) / 2.0**64


def mixed(codes: Ints, seed: int, i: int) -> npt.NDArray[np.uint64]:
    """Return 64 well mixed bits for each code of field i (the finaliser of MurmurHash3)."""
    start = (seed * 0x9E3779B97F4A7C15 + i * 0xD1B54A32D192ED03) % 2**64
    bits = codes.view(np.uint64) + np.uint64(start)
    bits ^= bits >> np.uint64(33)
    bits *= np.uint64(0xFF51AFD7ED558CCD)
    bits ^= bits >> np.uint64(33)
    bits *= np.uint64(0xC4CEB9FE1A85EC53)
    return bits ^ (bits >> np.uint64(33))


def draw_logits(plan: Plan, block: int) -> tuple[Floats, _Block]:
    """Return the logits of a block, but for the bias, and its columns."""
    drawn = _draw_columns(plan, block)
    n_acting = sum(field.acts is not None for field in plan.fields) + plan.continuous // 2
    sd = SUM_SD / (n_acting / 3) ** 0.5
    sums = np.zeros((3, drawn.rows))
    for i, field in enumerate(plan.fields):
        if field.acts is not None:
            # A missing value (code -1) has an effect as any other.
            sums[field.acts] += (_uniform(drawn.codes[i], ~plan.seed % 2**32, i) - 0.5) * 12**0.5
    for i, number in enumerate(drawn.numbers):
        if i % 2:
            shaped = number if i % 4 == 1 else 1 - np.minimum(number**2, 4)
            sums[i // 2 % 3] += np.nan_to_num(shaped)
    who, what, where = sums * sd
    return bounded(together(who, what, where)), drawn


def draw_block(plan: Plan, block: int) -> pa.RecordBatch:
    """Return the rows of a block, as write_log writes them."""
    logits, drawn = draw_logits(plan, block)
    probability = np.round(sigmoid(logits + plan.bias), 6)
    clicked = drawn.random.random(drawn.rows) < probability
    at = block * BLOCK_ROWS + np.arange(drawn.rows)
    test_rows = plan.rows - plan.train_rows
    day = np.where(
        at < plan.train_rows,
        at * TRAIN_DAYS // plan.train_rows,
        TRAIN_DAYS + (at - plan.train_rows) * TEST_DAYS // max(test_rows, 1),
    )
    first = (FIRST_DAY - datetime.date(1970, 1, 1)).days
    columns = {
        "impression": pa.array(at),
        "date": pa.array((first + day).astype(np.int32)).cast(pa.date32()),
        "clicked": pa.array(clicked.astype(np.int8)),
        "true_probability": pa.array(probability),
    }
    for i, (field, codes) in enumerate(zip(plan.fields, drawn.codes, strict=True)):
        columns[field.name] = _texts(codes, field, plan.seed, i)
    for i, number in enumerate(drawn.numbers):
        # Four digits, as sensors and counters have them.
        columns[f"n{i + 1:03d}"] = pa.array(np.round(number, 4), from_pandas=True)
    return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))


LARGE = 50_000  # values of a field, from which on names are not kept but made


def _texts(codes: Ints, field: Field, seed: int, i: int) -> pa.Array:
    """Return values as logs have them: names, decimal ids or hexadecimal hashes; null for -1."""
    missing = codes < 0
    if field.values <= LARGE:
        return _names(field.name, field.values, seed, i).take(pa.array(codes, mask=missing))
    if i % 2:
        return pa.array(codes + 10_000_000, mask=missing).cast(pa.string())
    return _hexadecimal(mixed(codes, seed, i), missing)


@functools.lru_cache(maxsize=2048)
def _names(name: str, values: int, seed: int, i: int) -> pa.Array:
    codes = np.arange(values)
    if i % 3 == 0:
        return _hexadecimal(mixed(codes, seed, i), np.zeros(values, bool))
    return pa.array([f"{name}-{code}" for code in codes])


def _hexadecimal(bits: npt.NDArray[np.uint64], missing: npt.NDArray[np.bool_]) -> pa.Array:
    """Return 12 hexadecimal digits for each entry."""
    pairs = np.array([f"{byte:02x}".encode() for byte in range(256)]).view(np.uint16)
    text = pairs[bits.view(np.uint8).reshape(-1, 8)[:, :6]].tobytes()
    offsets = np.arange(len(bits) + 1, dtype=np.int32) * 12
    valid = None if not missing.any() else pa.array(~missing).buffers()[1]
    buffers = [valid, pa.py_buffer(offsets.tobytes()), pa.py_buffer(text)]
    return pa.Array.from_buffers(pa.string(), len(bits), buffers)
