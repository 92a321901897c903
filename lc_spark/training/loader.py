"""Turns Parquet shards into batches of model input; the only file that imports petastorm.

Each rank reads the row groups i with i mod world_size = rank, through one reader thread: with one
the order is the same every time. For training another thread makes the next batch meanwhile, so
that both overlap the step.
"""

import json
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from lc_spark.errors import LcSparkError, RankError
from lc_spark.field_map import FieldMap, require_same
from lc_spark.files import AnyPath, children, uri
from lc_spark.training.models import to_tensors

with warnings.catch_warnings():
    # petastorm 0.13 imports what pyarrow and setuptools have deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    from petastorm import make_batch_reader
    from pyarrow.filesystem import DaskFileSystem

MANIFEST_FILE = "manifest.json"
READ_AHEAD = 5  # entries of petastorm's queue, its least, two a row group; its own 50 can be a GB


class _Store(DaskFileSystem):  # type: ignore[misc]  # pyarrow has no types
    """A file system of fsspec, as pyarrow's legacy dataset takes it from petastorm."""

    def __init__(self, fs: Any) -> None:
        self.fs = fs  # pyarrow's own would warn that it is deprecated

    def isdir(self, path: str) -> bool:
        return bool(self.fs.isdir(path))

    def isfile(self, path: str) -> bool:
        return bool(self.fs.isfile(path))


class Batch(NamedTuple):
    """Rows as the models take them: [B, C], [B, C] or None, [B], [B]."""

    ids: Tensor  # int64, global
    values: Tensor | None  # float32
    labels: Tensor  # float32
    row_ids: Tensor  # int64
    folds: Tensor  # int64


def read_manifest(shards: AnyPath, field_map: FieldMap) -> dict[str, Any]:
    """Read the shards' manifest; refuses shards that were made with another field map."""
    path = shards / MANIFEST_FILE
    if not path.is_file():
        raise LcSparkError(f"There is no {path}: run the features stage first.")
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    require_same(field_map.fingerprint, manifest["fingerprint"], f"The manifest {path}")
    return manifest


def train_row_groups(
    shards: AnyPath, manifest: dict[str, Any], first_date: int | None = None
) -> list[int]:
    """Return the rows of each train row group, of first_date (days since 1970) or later."""
    groups: list[int] = manifest["splits"]["train"]["row_groups"]
    if first_date is None:
        return groups
    rows = []
    for path in _files(shards, manifest, "train"):
        with path.open("rb") as file:
            dates = pq.ParquetFile(file).read(["date"])["date"].to_numpy()
        rows.append(int((dates >= first_date).sum()))
    return rows


def steps_per_epoch(groups: Sequence[int], world_size: int, batch_size: int) -> int:
    """Return the number of batches that every rank can fill from its own train rows.

    groups are the rows of each row group (see train_row_groups). world_size * batch_size rows a
    step; what is left over differs from epoch to epoch, since the order does. Raises LcSparkError
    when a rank cannot fill one batch.
    """
    rows = min(sum(groups[rank::world_size]) for rank in range(world_size))
    if rows < batch_size:
        raise LcSparkError(
            f"training.batch_size is {batch_size}, but of {sum(groups):,} train rows in "
            f"{len(groups)} row groups one of {world_size} ranks gets only {rows:,}. Lower "
            "training.batch_size, or training.ranks, or shards.rows_per_group."
        )
    return int(rows // batch_size)


def training_batches(
    shards: AnyPath,
    manifest: dict[str, Any],
    field_map: FieldMap,
    rank: int,
    world_size: int,
    batch_size: int,
    epoch: int,
    seed: int,
    first_date: int | None = None,
) -> Generator[Batch, None, None]:
    """Yield exactly steps_per_epoch batches of batch_size train rows to a rank.

    Row groups, and rows within each, come in an order drawn from (seed, epoch). Rows of days
    before first_date (days since 1970) are passed over. A batch is made while the one before it is
    in use.
    """
    batches = _shuffled(
        shards, manifest, field_map, rank, world_size, batch_size, epoch, seed, first_date
    )
    with closing(batches), ThreadPoolExecutor(1, "batches") as thread:
        following = thread.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = thread.submit(next, batches, None)
            yield batch


def _shuffled(
    shards: AnyPath,
    manifest: dict[str, Any],
    field_map: FieldMap,
    rank: int,
    world_size: int,
    batch_size: int,
    epoch: int,
    seed: int,
    first_date: int | None,
) -> Generator[Batch, None, None]:
    groups = train_row_groups(shards, manifest, first_date)
    steps = steps_per_epoch(groups, world_size, batch_size)
    files = _files(shards, manifest, "train")[rank::world_size]
    random = np.random.default_rng([seed % 2**32, epoch, rank])
    # petastorm takes a seed of 0 for none.
    reader_seed = int(random.integers(1, 2**31))
    parts: list[Batch] = []
    missing = batch_size  # rows that the parts lack to a batch
    with closing(_row_groups(files, field_map, reader_seed, first_date is not None)) as row_groups:
        for columns in row_groups:
            rows = np.arange(len(columns["label"]))
            if first_date is not None:
                rows = rows[columns["date"] >= first_date]
            order = rows[random.permutation(len(rows))]
            while len(order) >= missing:
                parts.append(_batch(columns, order[:missing], field_map))
                yield _concatenate(parts)
                steps -= 1
                if steps == 0:
                    return
                order, parts, missing = order[missing:], [], batch_size
            parts.append(_batch(columns, order, field_map))
            missing -= len(order)


def evaluation_batches(
    shards: AnyPath,
    manifest: dict[str, Any],
    field_map: FieldMap,
    split: str,
    rank: int,
    world_size: int,
    batch_size: int,
) -> Iterator[Batch]:
    """Yield every row of a split once over all ranks, in the order of the files.

    Finite, with batches of at most batch_size rows; a rank may get more batches than another, or
    none, so nothing in the loop over them may wait for other ranks.
    """
    files = _files(shards, manifest, split)[rank::world_size]
    expected = manifest["splits"][split]["row_groups"][rank::world_size]
    expected = [rows for rows in expected if rows > 0]
    if not expected:
        return
    with closing(_row_groups(files, field_map, None)) as row_groups:
        # zip asks for the next expected size first: it ends without waiting for a group too many.
        for rows, columns in zip(expected, row_groups, strict=False):
            found = len(columns["label"])
            if found != rows:
                raise RankError(
                    f"A row group of {shards}/split={split} has {found} rows, the manifest says "
                    f"{rows}: run the features stage again."
                )
            for at in range(0, rows, batch_size):
                yield _batch(columns, slice(at, at + batch_size), field_map)


def _files(shards: AnyPath, manifest: dict[str, Any], split: str) -> list[AnyPath]:
    folder = shards / f"split={split}"
    files = [p for p in children(folder, "*.parquet") if not p.name.startswith((".", "_"))]
    expected = len(manifest["splits"][split]["row_groups"])
    if len(files) != expected:
        raise LcSparkError(
            f"{folder} has {len(files)} part files, the manifest says {expected}: run the features "
            "stage again."
        )
    return files


def _row_groups(
    files: Sequence[AnyPath],
    field_map: FieldMap,
    shuffle_seed: int | None,
    with_date: bool = False,
) -> Generator[Mapping[str, NDArray[Any]], None, None]:
    """Yield the row groups of the files without end, as columns: in order, or shuffled by the seed.

    Never a finite reader: petastorm 0.13 may take its ventilator for done between two of its own
    checks and drop the last row groups without a word. The callers count what they need.
    """
    names = ["label", "row_id", "fold", *(info.name for info in field_map.fields)]
    names += ["date"] if with_date else []
    # Its reader thread calls pyarrow's legacy dataset for every row group; the pin to pyarrow 14 is
    # known. Not in a `with`: that would end before the thread does.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"petastorm\.")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"petastorm\.")
    reader = make_batch_reader(
        [uri(path) for path in files],
        schema_fields=names,
        reader_pool_type="thread",
        workers_count=1,
        results_queue_size=READ_AHEAD,
        shuffle_row_groups=shuffle_seed is not None,
        seed=shuffle_seed,
        num_epochs=None,
        convert_early_to_numpy=True,
        filesystem=None if isinstance(files[0], Path) else _Store(files[0].fs),
    )
    try:
        for group in reader:
            yield group._asdict()
    finally:
        reader.stop()
        reader.join()


def _batch(
    columns: Mapping[str, NDArray[Any]], rows: slice | NDArray[np.int64], field_map: FieldMap
) -> Batch:
    ids, values = to_tensors({f.name: columns[f.name][rows] for f in field_map.fields}, field_map)
    return Batch(
        ids,
        values,
        torch.from_numpy(np.array(columns["label"][rows], np.float32)),
        torch.from_numpy(np.array(columns["row_id"][rows], np.int64)),
        torch.from_numpy(np.array(columns["fold"][rows], np.int64)),
    )


def _concatenate(parts: Sequence[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    values = [part.values for part in parts if part.values is not None]
    return Batch(
        torch.cat([part.ids.t() for part in parts], dim=1).t(),
        torch.cat([part.t() for part in values], dim=1).t() if values else None,
        torch.cat([part.labels for part in parts]),
        torch.cat([part.row_ids for part in parts]),
        torch.cat([part.folds for part in parts]),
    )
