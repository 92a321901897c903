"""What ranks send each other for M1 in a step, and what a second rank is worth.

    python tests/benchmarks/ranks.py

Bytes: two gloo ranks take a step of LC-DNN (random start) over batches whose ids are spread over d
= 10^6, 10^7, 10^8 features, as many of them distinct whatever d is. World counts what it hands to
each collective; with two ranks that is what a rank sends. `M1` is ids and gradients, `MLP` its
gradients and the loss.

Speed: rank 0 alone with one thread and the whole batch, beside two ranks with one thread and half
of it each, batches in memory; they take turns in the same two processes, and one round is not
counted.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator

import made_up
import torch

from lc_spark.systems import Training
from lc_spark.training.learner import Learner
from lc_spark.training.loader import Batch
from lc_spark.training.world import World

SIZES = (1_000_000, 10_000_000, 100_000_000)


def spread(batch: Batch, factor: int) -> Batch:
    """Return the batch with ids over `factor` times as many features, as many of them distinct."""
    return batch._replace(ids=batch.ids * factor)


def sent(world: World, batch_size: int) -> list[tuple[int, int, int, int]]:
    """Return d, distinct ids, and the bytes sent for M1 and for the MLP in a step, by d."""
    settings = Training(start="random", hidden=made_up.HIDDEN, batch_size=batch_size)
    fields = made_up.field_map(made_up.F, made_up.CONTINUOUS, SIZES[0])
    batch = made_up.batches(fields, 1, batch_size, made_up.Ids(), seed=world.rank)[0]
    rows = []
    for d in SIZES:
        large = made_up.field_map(made_up.F, made_up.CONTINUOUS, d)
        learner = made_up.learner("lc_dnn", large, settings, world)
        world.sent.clear()
        learner.step(spread(batch, d // SIZES[0]), 0)
        rows.append((d, made_up.distinct(batch), world.sent["gather"], world.sent["mean"]))
    return rows


def speed(world: World, times: int, steps: int) -> tuple[list[float], list[float]]:
    """Return seconds a step of one rank with a whole batch, and of two with half of it each."""
    torch.set_num_threads(1)
    fields = made_up.field_map(made_up.F, made_up.CONTINUOUS, made_up.D)
    alone, together = [], []
    half = made_up.BATCH_SIZE // 2
    settings = Training(start="random", hidden=made_up.HIDDEN)
    single = made_up.learner("lc_dnn", fields, settings)
    double = made_up.learner("lc_dnn", fields, settings, world)
    whole = made_up.batches(fields, 1, made_up.BATCH_SIZE, made_up.Ids())[0]
    part = slice(world.rank * half, (world.rank + 1) * half)
    assert whole.values is not None, "there are continuous fields"
    mine = Batch(
        whole.ids[part], whole.values[part], whole.labels[part], whole.row_ids, whole.folds[part]
    )
    for number in range(times + 1):
        world.from_rank_0(0)  # all are here
        one = per_step(single, whole, steps) if world.rank == 0 else 0.0
        world.from_rank_0(0)
        two = per_step(double, mine, steps)
        if number:
            alone.append(one)
            together.append(two)
    return alone, together


def per_step(learner: Learner, batch: Batch, steps: int) -> float:
    """Return the mean seconds of a step."""
    started = time.perf_counter()
    for number in range(steps):
        learner.step(batch, number)
    return (time.perf_counter() - started) / steps


def rows_of_bytes(batch_sizes: list[int]) -> Iterator[str]:
    """Yield the lines of the table of bytes."""
    yield "| rows a rank | d | distinct ids of rank 0 | bytes for M1 | by ids | for the MLP |"
    yield "|---|---|---|---|---|---|"
    for batch_size in batch_sizes:
        for d, distinct, m1, mlp in made_up.in_ranks(sent, 2, batch_size)[0]:
            yield (
                f"| {batch_size:,} | {d:,} | {distinct:,} | {m1:,} | {m1 / distinct:.2f} "
                f"| {mlp:,} |"
            )


def main() -> None:
    """Parse, measure, print two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    arguments = parser.parse_args()
    for line in rows_of_bytes([512, 4096]):
        print(line, flush=True)
    load = os.getloadavg()[0]
    alone, together = made_up.in_ranks(speed, 2, arguments.times, arguments.steps)[0]
    ratios = [a / b for a, b in zip(alone, together, strict=True)]
    print(f"\n{os.cpu_count()} cores, load before {load:.1f}; batch {made_up.BATCH_SIZE:,}")
    print("| | median ms a step | from | to | rows/s |")
    print("|---|---|---|---|---|")
    for name, taken in (("1 rank x 1 thread", alone), ("2 ranks x 1 thread", together)):
        median = statistics.median(taken)
        print(
            f"| {name} | {1e3 * median:.0f} | {1e3 * min(taken):.0f} | {1e3 * max(taken):.0f} "
            f"| {made_up.BATCH_SIZE / median:,.0f} |"
        )
    print(
        f"two by one: {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
