"""How the time and memory of a training step of LC-DNN grow with d, f, batch and ranks.

    python tests/benchmarks/large_d.py                                  # the table
    python tests/benchmarks/large_d.py --d 1000000000 --steps 100       # one size

Random start, k = 1, [2048, 1024], made-up batches in memory, every rank a new process. `M1 update`
is sorting ids, summing gradients, exchanging them between ranks and Adam; `gather` reads M1's rows.
Milliseconds are medians over the steps after the first. `peak` is the most memory that rank 0 ever
held (ru_maxrss), `process` what it held before M1 was made. The exponents are slopes in
logarithms: 1 grows in proportion, 0 not at all. The table's figure goes beside this file.
"""

import argparse
import os
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import made_up
from matplotlib.figure import Figure
from training_step import Clock

from lc_spark.systems import Training
from lc_spark.training.world import World


class Size(NamedTuple):
    """What a line of the table has."""

    d: int = made_up.D
    f: int = made_up.F
    batch_size: int = made_up.BATCH_SIZE
    ranks: int = 1


class Taken(NamedTuple):
    """What rank 0 measured; seconds of a step and bytes."""

    distinct: int
    step: float
    gather: float
    update: float
    before: int
    peak: int
    loss: float


GROWTH = {
    "d": [Size(d=d) for d in (100_000, 1_000_000, 10_000_000, 100_000_000)],
    "f": [Size(f=f) for f in (40, 158, 632)],
    "batch_size": [Size(batch_size=n) for n in (1024, 4096, 16384)],
    "ranks": [Size(ranks=ranks) for ranks in (1, 2)],
}


def peak_bytes() -> int:
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(world: World, size: Size, steps: int) -> Taken:
    """Take the steps; return what they took."""
    continuous = made_up.CONTINUOUS * size.f // made_up.F
    fields = made_up.field_map(size.f, continuous, size.d)
    batches = made_up.batches(fields, min(steps, 4), size.batch_size, made_up.Ids(), world.rank)
    distinct = made_up.distinct(batches[0])
    settings = Training(start="random", hidden=made_up.HIDDEN, batch_size=size.batch_size)
    before = peak_bytes()
    learner = made_up.learner("lc_dnn", fields, settings, world)
    assert learner.row_adam is not None, "a random start is trained"
    clock, parts = Clock(), []
    clock.time(learner, "_read_rows", "rows")
    clock.time(learner.model, "from_rows", "forward")
    clock.time(learner.row_adam, "step", "update")
    for number in range(steps):
        clock.seconds.clear()
        started = time.perf_counter()
        loss = learner.step(batches[number % len(batches)], number)
        whole = time.perf_counter() - started
        seconds = clock.seconds
        parts.append((whole, seconds["rows"] - seconds["forward"], seconds["update"]))
    step, gather, update = (statistics.median(p) for p in zip(*parts[1:], strict=True))
    return Taken(distinct, step, gather, update, before, peak_bytes(), loss)


def line(size: Size, taken: Taken) -> str:
    """Return a line of the table."""
    return (
        f"| {size.d:,} | {size.f} | {size.batch_size:,} | {size.ranks} | {taken.distinct:,} "
        f"| {1e3 * taken.step:.0f} | {1e3 * taken.gather:.1f} | {1e3 * taken.update:.1f} "
        f"| {taken.before / 1e9:.2f} | {taken.peak / 1e9:.2f} |"
    )


def exponents(steps: int, done: dict[Size, Taken]) -> Iterator[str]:
    """Measure and yield the lines of the table, then those of the exponents."""
    fits = []
    for name, sizes in GROWTH.items():
        for size in sizes:
            if size not in done:
                done[size] = made_up.in_ranks(measure, size.ranks, size, steps)[0]
                yield line(size, done[size])
        x = [float(getattr(size, name)) for size in sizes]
        taken = [done[size] for size in sizes]
        slopes = [
            made_up.slope(x, values)
            for values in (
                [t.step for t in taken],
                [t.gather for t in taken],
                [t.update for t in taken],
                [float(t.peak - t.before) for t in taken],
            )
        ]
        fits.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in slopes) + " |")
    yield "\n| exponent in | step | gather | M1 update | peak - process |"
    yield "|---|---|---|---|---|"
    yield from fits


def draw(done: dict[Size, Taken], path: Path) -> None:
    """Draw milliseconds, and memory beyond the process, against each thing that grows."""
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    panels = figure.subplots(2, len(GROWTH), squeeze=False)
    for column, (name, sizes) in enumerate(GROWTH.items()):
        x = [getattr(size, name) for size in sizes]
        taken = [done[size] for size in sizes]
        times, memory = panels[0][column], panels[1][column]
        for marker, part in zip("os^", ("step", "gather", "update"), strict=True):
            times.plot(x, [1e3 * getattr(t, part) for t in taken], marker=marker, label=part)
        memory.plot(x, [(t.peak - t.before) / 1e9 for t in taken], marker="o")
        for axes, label in ((times, "ms"), (memory, "GB beyond the process")):
            axes.set(xscale="log", xlabel=name, ylabel=label)
            axes.set_xticks(x, [f"{n:.0e}" if n > 99_999 else f"{n:,}" for n in x])
            axes.minorticks_off()
            axes.grid(color="#d5d5d5", linewidth=0.6)
        times.set_yscale("log")
        memory.set_ylim(bottom=0)
    lines = panels[0][0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path)


def main() -> None:
    """Parse, measure, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d", type=int, default=None, help="this size alone")
    parser.add_argument("--batch-size", type=int, default=made_up.BATCH_SIZE)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {arguments.steps} steps")
    print(
        "| d | f | batch | ranks | distinct ids | step ms | gather ms | M1 update ms "
        "| process GB | peak GB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    if arguments.d is None:
        done: dict[Size, Taken] = {}
        for text in exponents(arguments.steps, done):
            print(text, flush=True)
        draw(done, Path(__file__).parent / "growth_step.svg")
        return
    size = Size(d=arguments.d, batch_size=arguments.batch_size)
    taken = made_up.in_ranks(measure, 1, size, arguments.steps)[0]
    print(line(size, taken))
    print(f"loss of the last step {taken.loss:.4f}")


if __name__ == "__main__":
    main()
