import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_data import CATEGORICAL_MAP, FIELD_MAP, make_rows, write_shards

from lc_spark.errors import LcSparkError, RankError
from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.training import loader
from lc_spark.training.models import to_tensors

TRAIN = (100, 103, 97, 100, 111)  # row ids 0 .. 510
VALID = (40, 37, 5)  # row ids 511 .. 592


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A space and a % in the path: petastorm takes URLs.
    path = tmp_path_factory.mktemp("made up 100%")
    write_shards(path, FIELD_MAP, {"train": TRAIN, "valid": VALID})
    return path / "shards"


@pytest.fixture
def manifest(folder: Path) -> dict[str, Any]:
    return loader.read_manifest(folder, FIELD_MAP)


def groups_of(manifest: dict[str, Any]) -> list[int]:
    groups: list[int] = manifest["splits"]["train"]["row_groups"]
    return groups


def row_ids(batches: Iterator[loader.Batch]) -> list[int]:
    return [int(i) for batch in batches for i in batch.row_ids]


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_evaluation_sees_every_row_once_over_all_ranks(
    folder: Path, manifest: dict[str, Any], world_size: int
) -> None:
    for _ in range(5):  # a finite petastorm reader loses row groups now and then
        seen = []
        for rank in range(world_size):
            seen += row_ids(
                loader.evaluation_batches(
                    folder, manifest, FIELD_MAP, "train", rank, world_size, 16
                )
            )
        assert sorted(seen) == list(range(511))


def test_evaluation_batches_hold_what_the_rows_were_made_of(
    folder: Path, manifest: dict[str, Any]
) -> None:
    batches = list(loader.evaluation_batches(folder, manifest, FIELD_MAP, "valid", 0, 1, 16))
    assert max(len(batch.labels) for batch in batches) == 16
    rows = make_rows(40, 511)  # the first file of the split
    ids, values = to_tensors(rows, FIELD_MAP)
    assert values is not None
    assert torch.equal(torch.cat([b.ids for b in batches])[:40], ids)
    assert torch.equal(torch.cat([b.values for b in batches if b.values is not None])[:40], values)
    labels = torch.cat([b.labels for b in batches])[:40]
    assert torch.equal(labels, torch.from_numpy(rows["label"]))


# Rank 0 of 2 has files 0, 2, 4: 308 rows; rank 1 has 1, 3: 203.
@pytest.mark.parametrize(
    ("world_size", "batch_size", "steps"), [(1, 64, 7), (1, 511, 1), (2, 64, 3), (2, 203, 1)]
)
def test_training_gives_every_rank_exactly_the_same_number_of_full_batches(
    folder: Path, manifest: dict[str, Any], world_size: int, batch_size: int, steps: int
) -> None:
    assert loader.steps_per_epoch(groups_of(manifest), world_size, batch_size) == steps
    seen: list[int] = []
    for rank in range(world_size):
        batches = list(
            loader.training_batches(
                folder, manifest, FIELD_MAP, rank, world_size, batch_size, epoch=1, seed=0
            )
        )
        assert [len(batch.labels) for batch in batches] == [batch_size] * steps
        seen += row_ids(iter(batches))
    assert len(seen) == len(set(seen)) == steps * batch_size * world_size
    assert set(seen) <= set(range(511))


def test_order_is_of_seed_and_epoch_and_the_same_every_time(
    folder: Path, manifest: dict[str, Any]
) -> None:
    def order(epoch: int, seed: int) -> list[int]:
        return row_ids(loader.training_batches(folder, manifest, FIELD_MAP, 0, 1, 64, epoch, seed))

    first = order(1, 0)
    assert all(order(1, 0) == first for _ in range(5))
    assert order(2, 0) != first
    assert order(1, 1) != first
    # Different rows are left over, so that over the epochs every row is trained on.
    left_over = [set(range(511)) - set(order(epoch, 0)) for epoch in range(1, 6)]
    assert set.intersection(*left_over) == set()


def test_rows_keep_their_own_label_and_ids_when_shuffled(
    folder: Path, manifest: dict[str, Any]
) -> None:
    in_order = {}
    for batch in loader.evaluation_batches(folder, manifest, FIELD_MAP, "train", 0, 1, 64):
        for i, row_id in enumerate(batch.row_ids.tolist()):
            in_order[row_id] = (batch.ids[i].tolist(), batch.labels[i].item())
    for batch in loader.training_batches(folder, manifest, FIELD_MAP, 0, 1, 64, 3, 0):
        for i, row_id in enumerate(batch.row_ids.tolist()):
            assert in_order[row_id] == (batch.ids[i].tolist(), batch.labels[i].item())


def test_the_next_batch_is_made_while_one_is_in_use(
    folder: Path, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = threading.Semaphore(0)

    def counted(columns: Any, field_map: FieldMap) -> Any:
        tensors = to_tensors(columns, field_map)
        made.release()
        return tensors

    monkeypatch.setattr(loader, "to_tensors", counted)
    batches = loader.training_batches(folder, manifest, FIELD_MAP, 0, 1, 50, epoch=1, seed=0)
    next(batches)
    for _ in range(2):  # the first, and the second that no one has asked for
        assert made.acquire(timeout=60)
    batches.close()


def test_threads_end_with_the_batches(folder: Path, manifest: dict[str, Any]) -> None:
    before = set(threading.enumerate())
    batches = loader.training_batches(folder, manifest, FIELD_MAP, 0, 1, 64, epoch=1, seed=0)
    next(batches)
    assert set(threading.enumerate()) > before
    batches.close()
    assert set(threading.enumerate()) == before


def test_an_error_while_reading_ahead_reaches_the_training(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path, CATEGORICAL_MAP, {"train": (20, 20)})
    lacking = FieldMap((*CATEGORICAL_MAP.fields, FieldInfo("other", "categorical", 3)))
    batches = loader.training_batches(tmp_path / "shards", manifest, lacking, 0, 1, 5, 1, 0)
    with pytest.raises(KeyError, match="other"):
        list(batches)


def test_categorical_shards_give_no_values(tmp_path: Path) -> None:
    write_shards(tmp_path, CATEGORICAL_MAP, {"train": (50,)})
    manifest = loader.read_manifest(tmp_path / "shards", CATEGORICAL_MAP)
    batches = list(
        loader.training_batches(tmp_path / "shards", manifest, CATEGORICAL_MAP, 0, 1, 20, 1, 0)
    )
    assert [batch.values for batch in batches] == [None, None]
    assert batches[0].ids.shape == (20, 2)


def test_another_field_map_is_refused(folder: Path) -> None:
    other = FieldMap((FieldInfo("site", "categorical", 41),))
    with pytest.raises(LcSparkError, match=f"{FIELD_MAP.fingerprint}.*{other.fingerprint}"):
        loader.read_manifest(folder, other)


def test_missing_manifest_says_which_stage_to_run(tmp_path: Path) -> None:
    with pytest.raises(LcSparkError, match="run the features stage"):
        loader.read_manifest(tmp_path, FIELD_MAP)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 512), (2, 204), (6, 1)])
def test_too_few_rows_for_one_batch_a_rank_is_an_error(
    manifest: dict[str, Any], world_size: int, batch_size: int
) -> None:
    with pytest.raises(LcSparkError, match=r"Lower training\.batch_size"):
        loader.steps_per_epoch(groups_of(manifest), world_size, batch_size)


def test_part_files_that_do_not_fit_the_manifest_are_refused(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path, CATEGORICAL_MAP, {"train": (20, 20)})
    next((tmp_path / "shards" / "split=train").glob("part-00001*")).unlink()
    with pytest.raises(LcSparkError, match="has 1 part files, the manifest says 2"):
        list(loader.training_batches(tmp_path / "shards", manifest, CATEGORICAL_MAP, 0, 1, 5, 1, 0))


def test_row_groups_that_do_not_fit_the_manifest_are_refused(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path, CATEGORICAL_MAP, {"valid": (20, 20)})
    manifest["splits"]["valid"]["row_groups"] = [20, 21]
    with pytest.raises(RankError, match="has 20 rows, the manifest says 21"):
        list(
            loader.evaluation_batches(
                tmp_path / "shards", manifest, CATEGORICAL_MAP, "valid", 0, 1, 5
            )
        )


def test_reading_is_silent(
    folder: Path, manifest: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # petastorm leaves closing its files to the garbage collector, which Python does not show.
        warnings.simplefilter("ignore", ResourceWarning)
        list(loader.evaluation_batches(folder, manifest, FIELD_MAP, "valid", 0, 1, 16))
    assert [str(warning.message) for warning in caught] == []
    output = capfd.readouterr()
    assert output.out + output.err == ""
