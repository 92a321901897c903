"""How long a training step of LC-DNN takes with its loader, beside its MLP alone; and DNN's.

    python tests/benchmarks/training_step.py                 # the paper's AppData size
    python tests/benchmarks/training_step.py --profile       # where the time of a step goes
    python tests/benchmarks/training_step.py --systems dnn   # DNN beside LC-DNN, d = 200,000

Made-up shards of that size are written to a temporary folder. `MLP` takes a random dense input
[batch, f] through the same layers, loss, backward pass and AdamW; LC-DNN reads its batches through
the loader. A turn is some steps of one case after one step that is not counted; the cases take
turns, and one round is not counted. A row group has the rows of 8 batches, as the default of
shards.rows_per_group makes them at this size, and the 8 steps of a turn set off reading one. The
ratio is of rows/s, turn by turn, the median of them.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made_up
import torch
from torch import nn

from lc_spark.field_map import FieldMap
from lc_spark.systems import Training
from lc_spark.training import loader
from lc_spark.training.layers import Mlp
from lc_spark.training.learner import Learner

# Name of a case: what differs from the common settings.
LC_DNN: dict[str, dict[str, Any]] = {
    "LC-DNN, M1 frozen": {"start": "lr_cross_fitted", "m1": "frozen"},
    "LC-DNN, M1 joint": {"start": "lr_cross_fitted", "m1": "joint"},
    "LC-DNN, random start": {"start": "random"},
}
GROUP = 8  # batches in a row group
Turn = Callable[[int], float]  # number of steps -> seconds


class Clock:
    """Seconds by part of a step, taken by methods that are replaced by timed ones."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def time(self, owner: Any, method: str, part: str) -> None:
        """Count what a method takes to a part."""
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - started

        setattr(owner, method, timed)


def mlp_turn(f: int, settings: Training) -> Turn:
    """Return a turn of the MLP alone."""
    torch.manual_seed(0)
    mlp = Mlp(f, settings.hidden, settings.batch_norm, settings.dropout)
    adamw = torch.optim.AdamW(mlp.parameters(), lr=settings.learning_rate, fused=True)
    x, labels = torch.randn(settings.batch_size, f), torch.zeros(settings.batch_size)
    bfloat16 = settings.precision == "bfloat16"

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = mlp(x)
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels)
        adamw.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adamw.step()

    def turn(steps: int) -> float:
        step()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        return time.perf_counter() - started

    return turn


def learner_turn(
    learner: Learner, shards: Path, fields: FieldMap, clock: Clock | None = None
) -> Turn:
    """Return a turn of a learner over batches that it reads from the shards."""
    manifest = loader.read_manifest(shards, fields)
    size = learner.settings.batch_size
    batches = loader.training_batches(shards, manifest, fields, 0, 1, size, epoch=1, seed=0)
    clock = clock or Clock()

    def turn(steps: int) -> float:
        learner.step(next(batches), 0)
        clock.seconds.clear()
        started = time.perf_counter()
        for number in range(steps):
            waiting = time.perf_counter()
            batch = next(batches)
            clock.seconds["loader: wait"] += time.perf_counter() - waiting
            learner.step(batch, number)
        return time.perf_counter() - started

    return turn


def cases(
    arguments: argparse.Namespace, shards: Path, fields: FieldMap
) -> dict[tuple[str, str], Turn]:
    """Return the turns by what takes the step and how."""
    turns: dict[tuple[str, str], Turn] = {}
    for precision, batch_norm in itertools.product(arguments.precision, arguments.batch_norm):
        common = {
            "hidden": arguments.hidden,
            "batch_size": arguments.batch_size,
            "precision": precision,
            "batch_norm": batch_norm == "yes",
        }
        how = f"{precision}, {'' if batch_norm == 'yes' else 'no '}BatchNorm"
        settings = Training.model_validate(common)
        turns["MLP", how] = mlp_turn(len(fields.fields), settings)
        for name, differs in LC_DNN.items():
            settings = Training.model_validate(common | differs)
            learner = made_up.learner("lc_dnn", fields, settings)
            turns[name, how] = learner_turn(learner, shards, fields)
        if arguments.systems == "dnn":
            settings = Training.model_validate(common | {"start": "random"})
            learner = made_up.learner("dnn", fields, settings)
            turns["DNN", how] = learner_turn(learner, shards, fields)
    return turns


def compare(arguments: argparse.Namespace, shards: Path, fields: FieldMap) -> None:
    """Let the cases take turns; print a table."""
    turns = cases(arguments, shards, fields)
    seconds: dict[tuple[str, str], list[float]] = {case: [] for case in turns}
    for number in range(arguments.times + 1):
        for case, turn in turns.items():
            steps = 1 if case[0] == "DNN" else arguments.steps
            taken = turn(steps) / steps
            if number:
                seconds[case].append(taken)
    print("| a step of | | median ms | from | to | rows/s | rows/s by MLP's |")
    print("|---|---|---|---|---|---|---|")
    for (name, how), each in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["MLP", how], each, strict=True))
        median = statistics.median(each)
        print(
            f"| {name} | {how} | {1e3 * median:.0f} | {1e3 * min(each):.0f} "
            f"| {1e3 * max(each):.0f} | {arguments.batch_size / median:,.0f} | {ratio:.3f} |"
        )
    for name, how in seconds:
        if name in LC_DNN and ("DNN", how) in seconds:
            pairs = zip(seconds["DNN", how], seconds[name, how], strict=True)
            print(f"DNN's step by that of {name}: {statistics.median(a / b for a, b in pairs):.1f}")


def profile(arguments: argparse.Namespace, shards: Path, fields: FieldMap) -> None:
    """Print the milliseconds of the parts of a step, a column a start of M1."""
    parts: dict[str, dict[str, float]] = {}
    with timed_backward() as clock:
        for name, differs in LC_DNN.items():
            settings = Training.model_validate(
                {
                    "hidden": arguments.hidden,
                    "batch_size": arguments.batch_size,
                    "precision": arguments.precision[0],
                    "batch_norm": arguments.batch_norm[0] == "yes",
                    **differs,
                }
            )
            learner = made_up.learner("lc_dnn", fields, settings)
            clock.time(learner, "_read_rows", "rows")
            clock.time(learner.model, "from_rows", "MLP forward")
            clock.time(learner, "_average_gradients", "gradients as one vector")
            clock.time(learner.adamw, "step", "AdamW")
            for row_adam in (learner.row_adam, learner.copies and learner.copies.row_adam):
                if row_adam is not None:
                    clock.time(row_adam, "step", "M1 update")
            total = learner_turn(learner, shards, fields, clock)(arguments.steps)
            taken = dict(clock.seconds)
            taken["gather"] = taken.pop("rows") - taken["MLP forward"]
            taken["other"] = total - sum(taken.values())
            parts[name] = taken | {"all": total}
    print(f"{arguments.precision[0]}, BatchNorm {arguments.batch_norm[0]}; ms a step")
    print("| | " + " | ".join(parts) + " |")
    print("|---" * (len(parts) + 1) + "|")
    for part in [*sorted({p for taken in parts.values() for p in taken if p != "all"}), "all"]:
        row = [f"{1e3 * taken.get(part, 0) / arguments.steps:.1f}" for taken in parts.values()]
        print(f"| {part} | " + " | ".join(row) + " |")


@contextlib.contextmanager
def timed_backward() -> Iterator[Clock]:
    """Give a clock that counts backward passes until the end of the block."""
    clock, original = Clock(), torch.Tensor.backward
    clock.time(torch.Tensor, "backward", "MLP backward")
    try:
        yield clock
    finally:
        torch.Tensor.backward = original  # type: ignore[method-assign]


def parsed() -> argparse.Namespace:
    """Return the command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--f", type=int, default=made_up.F)
    parser.add_argument("--continuous", type=int, default=made_up.CONTINUOUS)
    parser.add_argument("--d", type=int, default=None)
    parser.add_argument("--skew", type=float, default=made_up.Ids().skew, help="1: uniform")
    parser.add_argument("--hidden", type=lambda s: s.split(","), default=made_up.HIDDEN)
    parser.add_argument("--batch-size", type=int, default=made_up.BATCH_SIZE)
    parser.add_argument("--precision", type=lambda s: s.split(","), default=["float32"])
    parser.add_argument("--batch-norm", type=lambda s: s.split(","), default=None)
    parser.add_argument("--systems", choices=["lc_dnn", "dnn"], default="lc_dnn")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--steps", type=int, default=GROUP)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    dnn = arguments.systems == "dnn"
    arguments.d = arguments.d or (200_000 if dnn else made_up.D)
    arguments.batch_norm = arguments.batch_norm or (["yes"] if dnn else ["yes", "no"])
    return arguments


def main() -> None:
    """Parse, write shards, measure, print a table."""
    arguments = parsed()
    fields = made_up.field_map(arguments.f, arguments.continuous, arguments.d)
    ids = made_up.Ids(arguments.skew)
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        steps = 1 + arguments.steps
        if not arguments.profile:
            steps *= 1 + arguments.times
        groups = -(-steps // GROUP)
        made_up.write_shards(shards, fields, groups, GROUP * arguments.batch_size, ids)
        batch = made_up.batches(fields, 1, arguments.batch_size, ids)[0]
        print(
            f"f {arguments.f}, d {fields.d:,}, batch {arguments.batch_size:,} with "
            f"{made_up.distinct(batch):,} distinct ids, hidden {list(arguments.hidden)}, "
            f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
        )
        (profile if arguments.profile else compare)(arguments, shards, fields)


if __name__ == "__main__":
    main()
