import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_data import FIELD_MAP, make_rows

from lc_spark.systems import Training
from lc_spark.training import models
from lc_spark.training.learner import Learner
from lc_spark.training.loader import Batch
from lc_spark.training.optim import RowAdam, sorted_ids, sum_by_id
from lc_spark.training.world import World, joined

D, K, RATE, DECAY = 50, 3, 0.05, 0.1
ALONE = World(0, 1, torch.device("cpu"))


def make_steps(steps: int = 6, rows: int = 40) -> list[tuple[Tensor, Tensor]]:
    """Return ids [rows], few of them frequent, and gradients [rows, K], for each step."""
    random = np.random.default_rng(1)
    return [
        (
            torch.from_numpy((D * random.random(rows) ** 3).astype(np.int64)),
            torch.from_numpy(random.normal(size=(rows, K)).astype(np.float32)),
        )
        for _ in range(steps)
    ]


def start() -> Tensor:
    return torch.from_numpy(np.random.default_rng(2).normal(size=(D, K)).astype(np.float32))


def dense_reference(steps: list[tuple[Tensor, Tensor]], decay: float) -> NDArray[Any]:
    """Adam over a whole dense gradient, but for rows that the step does not name."""
    table = start().double().numpy()
    first, second = np.zeros((D, K)), np.zeros((D, K))
    for t, (ids, gradients) in enumerate(steps, 1):
        dense = np.zeros((D, K))
        np.add.at(dense, ids.numpy(), gradients.double().numpy())
        there = np.isin(np.arange(D), ids.numpy())[:, None]
        first = np.where(there, 0.9 * first + 0.1 * dense, first)
        second = np.where(there, 0.999 * second + 0.001 * dense**2, second)
        rate = RATE / t * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        updated = table * (1 - RATE / t * decay) - rate * first / (np.sqrt(second) + 1e-8)
        table = np.where(there, updated, table)
    return table


def update(
    table: Tensor, steps: list[tuple[Tensor, Tensor]], decay: float, world: World
) -> RowAdam:
    adam = RowAdam([table], RATE, decay, world)
    for t, (ids, gradients) in enumerate(steps, 1):
        adam.step(ids, [gradients], factor=1 / t)
    return adam


@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_rows_present_move_as_under_dense_adam_and_others_stand_still(decay: float) -> None:
    table, steps = start(), make_steps()
    update(table, steps, decay, ALONE)
    np.testing.assert_allclose(table.numpy(), dense_reference(steps, decay), rtol=1e-4, atol=1e-5)
    absent = np.setdiff1d(np.arange(D), np.concatenate([ids.numpy() for ids, _ in steps]))
    assert len(absent) > 0
    assert torch.equal(table[absent], start()[absent])


def test_without_decay_it_is_torchs_sparse_adam() -> None:
    table, steps = start(), make_steps()
    update(table, steps, 0.0, ALONE)
    parameter = torch.nn.Parameter(start())
    reference = torch.optim.SparseAdam([parameter], lr=RATE)
    for t, (ids, gradients) in enumerate(steps, 1):
        reference.param_groups[0]["lr"] = RATE / t
        parameter.grad = torch.sparse_coo_tensor(
            ids[None], gradients, (D, K), check_invariants=True
        )
        reference.step()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(table, parameter.detach(), rtol=1e-4, atol=1e-5)


def test_tables_that_share_ids_move_as_each_alone() -> None:
    steps = make_steps()
    left, right = start()[:, :1].clone(), start()[:, 1:].clone()
    adam = RowAdam([left, right], RATE, DECAY, ALONE)
    for t, (ids, gradients) in enumerate(steps, 1):
        adam.step(ids, [gradients[:, :1], gradients[:, 1:]], factor=1 / t)
    together = start()
    update(together, steps, DECAY, ALONE)
    assert torch.equal(torch.cat([left, right], dim=1), together)


def test_gradients_of_one_id_are_summed() -> None:
    distinct, sums = sum_by_id(
        torch.tensor([7, 2, 7, 7]), torch.tensor([[1.0, 0.5], [2.0, 2.0], [4.0, -1.0], [8.0, 0.0]])
    )
    assert distinct.tolist() == [2, 7]
    assert sums.tolist() == [[2.0, 2.0], [13.0, -0.5]]


@given(st.lists(st.integers(0, 2**40), max_size=60), st.integers(1, 4))
def test_sums_are_those_of_numpy(listed: list[int], k: int) -> None:
    ids = np.array(listed + listed[::2], np.int64)
    gradients = np.random.default_rng(0).normal(size=(len(ids), k)).astype(np.float32)
    distinct, sums = sum_by_id(torch.from_numpy(ids), torch.from_numpy(gradients))
    expected_ids, places = np.unique(ids, return_inverse=True)
    expected = np.zeros((len(expected_ids), k), np.float32)
    np.add.at(expected, places, gradients)
    np.testing.assert_array_equal(distinct.numpy(), expected_ids)
    np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-6, atol=1e-6)


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 12))
def test_ids_are_sorted_as_by_torch_whatever_their_columns_share(
    seed: int, rows: int, width: int
) -> None:
    random = np.random.default_rng(seed)
    sizes = 10 ** random.integers(1, 9, width)
    starts = np.cumsum([0, *sizes[:-1]]) * random.integers(0, 2)  # fields of their own, or not
    starts[random.integers(width) :] = starts[-1]  # those of one field of several values
    ids = torch.from_numpy(random.integers(0, sizes, (rows, width)) + starts)
    for given_ids in (ids, ids.flatten(), ids.flatten().sort().values):
        expected = torch.sort(given_ids.flatten(), stable=True)
        found, order = sorted_ids(given_ids)
        assert torch.equal(found, expected.values)
        assert torch.equal(order, expected.indices)


def test_no_ids_are_sorted_too() -> None:
    for none in (torch.empty(0, dtype=torch.int64), torch.empty(0, 3, dtype=torch.int64)):
        found, order = sorted_ids(none)
        assert found.numel() == order.numel() == 0


@pytest.mark.parametrize("k", [1, 8])
def test_many_rows_are_summed_in_the_same_order_whatever_the_threads(k: int) -> None:
    random = np.random.default_rng(0)
    ids = torch.from_numpy((5000 * random.random(200_000) ** 4).astype(np.int64))
    gradients = torch.from_numpy(random.normal(size=(len(ids), k)).astype(np.float32))
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            runs.append(sum_by_id(ids, gradients))
    finally:
        torch.set_num_threads(threads)
    for distinct, sums in runs[1:]:
        assert torch.equal(distinct, runs[0][0])
        assert torch.equal(sums, runs[0][1])


def test_a_step_without_ids_changes_nothing() -> None:
    table = start()
    adam = RowAdam([table], RATE, DECAY, ALONE)
    adam.step(torch.empty(0, dtype=torch.int64), [torch.empty(0, K)], factor=1.0)
    assert torch.equal(table, start())


def test_goes_on_from_a_saved_state_bit_for_bit() -> None:
    steps = make_steps()
    table = start()
    whole = update(table.clone(), steps, DECAY, ALONE)
    before = update(table, steps[:3], DECAY, ALONE)
    after = RowAdam([table], RATE, DECAY, ALONE)
    after.load_state({name: tensor.clone() for name, tensor in before.state().items()})
    for t, (ids, gradients) in enumerate(steps[3:], 4):
        after.step(ids, [gradients], factor=1 / t)
    assert torch.equal(after.tables[0], whole.tables[0])
    assert torch.equal(after.second[0], whole.second[0])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """Return what _in_a_rank made in each of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_in_a_rank, args=(r, port, folder)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        assert process.exitcode == 0
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


def _in_a_rank(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with joined("cpu") as world:
        made = _update_by_parts(world) | _learn(world) | _count_bytes(world)
    save_file(made, folder / f"{rank}.safetensors")


def _update_by_parts(world: World) -> dict[str, Tensor]:
    # Unequal parts: rank 0 has 10 rows of a step, rank 1 the other 30. The mean over ranks of the
    # sums is half the sum over all rows, hence the factor 2.
    part = slice(0, 10) if world.rank == 0 else slice(10, 40)
    table = start()
    update(
        table, [(ids[part], 2 * gradients[part]) for ids, gradients in make_steps()], DECAY, world
    )
    return {"table": table}


@pytest.mark.slow
def test_two_ranks_with_parts_of_a_step_move_as_one_with_all_of_it(
    ranks: list[dict[str, Tensor]],
) -> None:
    tables = [rank["table"] for rank in ranks]
    assert torch.equal(tables[0], tables[1])
    alone = start()
    update(alone, make_steps(), DECAY, ALONE)
    torch.testing.assert_close(tables[0], alone, rtol=1e-5, atol=1e-6)


def _learn(world: World) -> dict[str, Tensor]:
    """Take three steps of a whole network over 64 rows, of which each rank has its part."""
    torch.manual_seed(3)
    settings = Training(hidden=(16, 8), batch_norm=False, start="random", m1_weight_decay=0.1)
    learner = Learner(models.build("lc_wd", FIELD_MAP, settings), settings, 3, world)
    part = slice(64 * world.rank // world.size, 64 * (world.rank + 1) // world.size)
    for step in range(3):
        rows = make_rows(64, step)
        ids, values = models.to_tensors({k: v[part] for k, v in rows.items()}, FIELD_MAP)
        labels = torch.from_numpy(rows["label"][part])
        learner.step(Batch(ids, values, labels, torch.arange(64)[part], ids[:, 0]), step)
    parameters = learner.model.named_parameters()
    return {f"learnt.{name}": tensor.detach().clone() for name, tensor in parameters}


@pytest.mark.slow
def test_two_ranks_with_half_a_batch_each_learn_what_one_learns_of_all(
    ranks: list[dict[str, Tensor]],
) -> None:
    first, second = ranks
    alone = _learn(ALONE)
    assert "learnt.m1.weight" in alone
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], expected, rtol=1e-4, atol=1e-5)


def _count_bytes(world: World) -> dict[str, Tensor]:
    """Return the bytes that a rank sends in a step over tables of different d, ids spread alike."""
    counts = {}
    for spread in (1, 1000):
        for step, (ids, gradients) in enumerate(make_steps(2, rows=400)):
            part = slice(0, 100) if world.rank == 0 else slice(100, 400)
            world.sent.clear()
            adam = RowAdam([torch.zeros(D * spread, K)], RATE, DECAY, world)
            adam.step(ids[part] * spread, [gradients[part]], factor=1.0)
            counts[f"bytes.{spread}.{step}"] = torch.tensor(world.sent.total())
    return counts


@pytest.mark.slow
def test_bytes_of_a_step_are_those_of_its_distinct_ids_whatever_d_is(
    ranks: list[dict[str, Tensor]],
) -> None:
    for step, (ids, _) in enumerate(make_steps(2, rows=400)):
        # An int64 and K float32 for each distinct id of the rank that has more of them; and twice
        # how many there are.
        longest = max(len(np.unique(part)) for part in (ids[:100], ids[100:]))
        for rank in ranks:
            assert (
                rank[f"bytes.1.{step}"]
                == rank[f"bytes.1000.{step}"]
                == longest * (8 + 4 * K) + 2 * 8
            )
