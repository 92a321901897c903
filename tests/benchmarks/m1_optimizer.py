"""What M1's optimiser is worth on the validation rows, and what it takes.

    python tests/benchmarks/m1_optimizer.py conf/synthetic.yaml --channels 1
    python tests/benchmarks/m1_optimizer.py conf/flights.yaml --channels 8

LC-DNN with a random start and the config's own `training`, one rank with the batches of all its
ranks together. Each optimiser has three learning rates, and the line shows the one with the lowest
validation log loss (the mean over the seeds at the best look, by AUC). `ms a step` is the update of
M1 alone, in these trainings (mean) and over made-up batches of the paper's size (median of 5).

- RowAdam: the library's; the bias correction counts steps.
- count a row: the same, but it counts a row's own updates.
- SparseAdam: torch's own, whose rule is RowAdam's without weight decay.
- row Adagrad: a row's sum of its mean squared gradients, one number a row.
- dense Adam: every row in every step, whether it is there or not: the rule that the others save on.
"""

import argparse
import re
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import made_up
import torch
from defaults import prepare
from torch import Tensor, nn
from training_step import Clock

from lc_spark import config_file
from lc_spark.config import Config
from lc_spark.systems import System, Training
from lc_spark.training import launch
from lc_spark.training.loop import train
from lc_spark.training.optim import RowAdam, sum_by_id
from lc_spark.training.spec import RESULT_FILE
from lc_spark.training.world import World


class Other(RowAdam):
    """The interface of RowAdam over another rule, for one table and one rank."""

    def step(self, ids: Tensor, gradients: Sequence[Tensor | None], factor: float) -> None:
        """Update the table's rows."""
        [table], [gradient] = self.tables, gradients
        assert gradient is not None, "a random start is trained"
        self.update(table, *sum_by_id(ids, gradient), self.learning_rate * factor)

    def update(self, table: Tensor, ids: Tensor, gradient: Tensor, rate: float) -> None:
        """Update the rows of distinct ids by their summed gradients."""
        raise NotImplementedError


class CountARow(Other):
    """Adam whose bias correction counts a row's own updates."""

    def __init__(self, *arguments: Sequence[Tensor] | float | World) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.counts = torch.zeros(len(self.tables[0]), 1)

    def update(self, table: Tensor, ids: Tensor, gradient: Tensor, rate: float) -> None:
        count = self.counts[ids] + 1
        self.counts[ids] = count
        first = self.first[0][ids].lerp_(gradient, 1 - self.BETA1)
        second = self.second[0][ids].lerp_(gradient.square(), 1 - self.BETA2)
        self.first[0][ids], self.second[0][ids] = first, second
        first = first / (1 - self.BETA1**count)
        second = second / (1 - self.BETA2**count)
        table[ids] -= rate * first / (second.sqrt() + self.EPSILON)


class RowAdagrad(Other):
    """Adagrad with one sum of squares a row."""

    def __init__(self, *arguments: Sequence[Tensor] | float | World) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.sums = torch.zeros(len(self.tables[0]), 1)

    def update(self, table: Tensor, ids: Tensor, gradient: Tensor, rate: float) -> None:
        sums = self.sums[ids] + gradient.square().mean(1, keepdim=True)
        self.sums[ids] = sums
        table[ids] -= rate * gradient / (sums.sqrt() + self.EPSILON)


class Torch(Other):
    """One of torch's own optimisers."""

    def __init__(self, *arguments: Sequence[Tensor] | float | World) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.parameter = nn.Parameter(self.tables[0])
        self.optimizer = self.make()

    def make(self) -> torch.optim.Optimizer:
        """Return the optimiser of the parameter."""
        raise NotImplementedError

    def gradient_of(self, ids: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient as the optimiser takes it."""
        raise NotImplementedError

    def step(self, ids: Tensor, gradients: Sequence[Tensor | None], factor: float) -> None:
        [gradient] = gradients
        assert gradient is not None, "a random start is trained"
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * factor
        self.parameter.grad = self.gradient_of(ids.flatten(), gradient)
        self.optimizer.step()


class TorchSparseAdam(Torch):
    """torch.optim.SparseAdam."""

    def make(self) -> torch.optim.Optimizer:
        return torch.optim.SparseAdam([self.parameter])

    def gradient_of(self, ids: Tensor, gradient: Tensor) -> Tensor:
        shape = self.parameter.shape
        return torch.sparse_coo_tensor(ids[None], gradient, shape, check_invariants=False)


class DenseAdam(Torch):
    """torch.optim.Adam over the whole gradient, fused."""

    def make(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.parameter], fused=True)

    def gradient_of(self, ids: Tensor, gradient: Tensor) -> Tensor:
        return torch.zeros_like(self.parameter).index_add_(0, ids, gradient)


ADAM_RATES = (0.003, 0.01, 0.03)
KINDS: dict[str, tuple[type[RowAdam], tuple[float, ...]]] = {
    "RowAdam": (RowAdam, ADAM_RATES),
    "count a row": (CountARow, ADAM_RATES),
    "SparseAdam": (TorchSparseAdam, ADAM_RATES),
    "row Adagrad": (RowAdagrad, (0.01, 0.03, 0.1)),
    "dense Adam": (DenseAdam, (0.001, 0.003, 0.01)),
}


def quality(
    config: Config, kind: str, rate: float, seeds: Sequence[int]
) -> tuple[float, float, float]:
    """Return the best validation log loss and AUC, and the ms that an update of M1 took."""
    timed = type(kind, (KINDS[kind][0],), {})
    clock = Clock()
    clock.time(timed, "step", "update")
    settings = {**config.training.model_dump(), "m1_learning_rate": rate}
    results = []
    for seed in seeds:
        name = re.sub(r"\W", "_", f"{kind}_{config.training.channels}_{rate}_{seed}")
        system = System(system="lc_dnn", name=name, training=settings)
        spec = launch.train_spec(config, system, None, seed)
        (Path(spec.output) / RESULT_FILE).unlink(missing_ok=True)  # it is timed too
        with patch("lc_spark.training.learner.RowAdam", timed):
            results.append(train(spec))
    rows = sum(entry["rows"] for result in results for entry in result["epochs"])
    return (
        statistics.mean(r["best_valid_logloss"] for r in results),
        statistics.mean(r["best_valid_auc"] for r in results),
        1e3 * clock.seconds["update"] / rows * config.training.batch_size,
    )


def paper_size(channels: int) -> dict[str, float]:
    """Return the median ms of an update over batches of the paper's size, by kind."""
    fields = made_up.field_map(made_up.F, made_up.CONTINUOUS, made_up.D)
    batch = made_up.batches(fields, 1, made_up.BATCH_SIZE, made_up.Ids())[0]
    gradient = torch.randn(batch.ids.numel(), channels)
    taken = {}
    for kind, (optimizer, rates) in KINDS.items():
        table = torch.zeros(fields.d, channels)
        made = optimizer([table], rates[0], 0.0, World(0, 1, torch.device("cpu")))
        seconds = []
        for _ in range(6):
            started = time.perf_counter()
            made.step(batch.ids, [gradient], 1.0)
            seconds.append(time.perf_counter() - started)
        taken[kind] = 1e3 * statistics.median(seconds[1:])
    return taken


def main() -> None:
    """Parse, train, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--workspace", default="workspace/m1_optimizer")
    arguments = parser.parse_args()
    given = config_file.load(arguments.config)
    training: Training = given.training.model_copy(
        update={
            "ranks": 1,
            "batch_size": given.training.batch_size * given.training.ranks,
            "start": "random",
            "channels": arguments.channels,
            "epochs": arguments.epochs,
        }
    )
    config = Config.model_validate(
        {
            **given.model_dump(),
            "workspace": f"{arguments.workspace}/{given.name}",
            "training": training.model_dump(),
            "systems": [{"system": "lc_dnn"}],
        }
    )
    warnings.filterwarnings(
        "ignore", message="Sparse invariant checks"
    )  # of SparseAdam's gradients
    prepare(config, ("ingest", "features"))
    at_paper_size = paper_size(arguments.channels)
    print(
        f"| {given.name}, k = {arguments.channels} | learning rate | valid log loss | valid AUC "
        "| ms a step | ms a step, the paper's size |"
    )
    print("|---|---|---|---|---|---|", flush=True)
    for kind, (_, rates) in KINDS.items():
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
        tried = {rate: quality(config, kind, rate, seeds) for rate in rates}
        rate = min(tried, key=lambda r: tried[r][0])
        loss, auc, ms = tried[rate]
        print(
            f"| {kind} | {rate:g} | {loss:.5f} | {auc:.4f} | {ms:.2f} "
            f"| {at_paper_size[kind]:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
