"""Turns the runs of an experiment into lines that can be compared: seeds together, against LR."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lc_spark import bootstrap
from lc_spark.bootstrap import Interval
from lc_spark.cells import Cell
from lc_spark.facts import Facts
from lc_spark.metrics import Metrics

AUC, LOGLOSS = 0, 1  # columns of bootstrap.replicates


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: the result of its training, or the error."""

    cell: Cell
    result: Facts
    error: str


@dataclass(frozen=True)
class Line:
    """The seeds of one system and start, together."""

    name: str
    trained: list[Outcome]
    failed: list[Outcome]
    metrics: list[Metrics]
    auc_gain: Interval  # over LR
    logloss_gain: Interval

    def mean(self, key: str) -> float:
        """Return the mean over seeds of a metric."""
        return float(np.mean([getattr(one, key) for one in self.metrics]))

    def sd(self, key: str) -> float | None:
        """Return the standard deviation over seeds of a metric, None for a single run."""
        values = [getattr(one, key) for one in self.metrics]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    def noted(self, key: str) -> float:
        """Return the mean over seeds of a number that training noted."""
        return float(np.mean([outcome.result[key] for outcome in self.trained]))


def lines_of(
    outcomes: Sequence[Outcome],
    found: Mapping[str, Metrics],
    redrawn: Mapping[str, NDArray[np.float64]],
) -> list[Line]:
    """Put the seeds of each system and start together; outcomes begin with LR.

    found and redrawn (see bootstrap.replicates) are by the cells' names.
    """
    lr = outcomes[0].cell.system.name
    lines = []
    for name, group in itertools.groupby(outcomes, key=lambda outcome: outcome.cell.line):
        members = list(group)
        trained = [outcome for outcome in members if not outcome.error]
        if not trained:
            continue
        names = [outcome.cell.system.name for outcome in trained]
        ours = [found[n] for n in names]
        gains = [
            bootstrap.difference(
                [redrawn[n] for n in names],
                [redrawn[lr]],
                column,
                float(np.mean([getattr(m, key) for m in ours])) - getattr(found[lr], key),
            )
            for column, key in ((AUC, "auc"), (LOGLOSS, "logloss"))
        ]
        failed = [outcome for outcome in members if outcome.error]
        lines.append(Line(name, trained, failed, ours, *gains))
    return lines


def interval_text(interval: Interval, form: str) -> str:
    """Write a difference with its interval in brackets, each number in a format such as ".4f"."""
    value, low, high = (f"{number:+{form}}" for number in interval)
    return f"{value} [{low}, {high}]"


def curves_of(lines: Sequence[Line]) -> dict[str, dict[str, list[float]]]:
    """Return the mean over seeds by epoch, for the starts of the first system that has several."""
    started = [line for line in lines if line.trained[0].cell.start]
    curves = {}
    for line in started:
        if line.trained[0].cell.label != started[0].trained[0].cell.label:
            continue
        histories = [outcome.result["epochs"] for outcome in line.trained]
        points = min(len(history) for history in histories)
        keys = ("epoch", "train_loss", "valid_logloss", "test_logloss", "test_auc")
        curves[line.trained[0].cell.start] = {
            key: [float(np.mean([h[i][key] for h in histories])) for i in range(points)]
            for key in keys
        }
    return curves


def speeds_of(lines: Sequence[Line]) -> dict[str, tuple[float, float]]:
    """Return seconds per epoch and rows a second, by system (its first line)."""
    speeds: dict[str, tuple[float, float]] = {}
    for line in lines:
        cell = line.trained[0].cell
        if cell.seed is not None and cell.label not in speeds:
            seconds = line.noted("seconds_per_epoch")
            speeds[cell.label] = (seconds, line.noted("rows_per_epoch") / seconds)
    return speeds


def _choices(lines: Sequence[Line]) -> list[str]:
    """Say which start of each system the validation rows choose."""
    said = []
    by_label = itertools.groupby(lines, key=lambda line: line.trained[0].cell.label)
    for label, group in by_label:
        started = [line for line in group if line.trained[0].cell.start]
        if len(started) > 1:
            best = min(started, key=lambda line: line.noted("best_valid_logloss"))
            loss = best.noted("best_valid_logloss")
            said.append(
                f"{label}: the lowest validation log loss ({loss:.5f}) is that of start "
                f"'{best.trained[0].cell.start}'."
            )
    return said


def claims_of(lines: Sequence[Line], redrawn: Mapping[str, NDArray[np.float64]]) -> list[str]:
    """Say of every system whether starting from LR weights helps, against a random start."""
    said = _choices(lines)
    by_place = {(o.cell.label, o.cell.start): line for line in lines for o in line.trained[:1]}
    for (label, start), line in by_place.items():
        random = by_place.get((label, "random"))
        if random is None or start in ("", "random"):
            continue
        spreads = []
        for column, key in ((AUC, "auc"), (LOGLOSS, "logloss")):
            ours = [redrawn[o.cell.system.name] for o in line.trained]
            theirs = [redrawn[o.cell.system.name] for o in random.trained]
            gain = line.mean(key) - random.mean(key)
            spreads.append(bootstrap.difference(ours, theirs, column, gain))
        better = spreads[1].high < 0
        worse = spreads[1].low > 0
        verdict = "helps" if better else "hurts" if worse else "makes no difference beyond chance"
        if len(line.trained) == 1:
            verdict += " (one seed)"
        said.append(
            f"{label}: start '{start}' {verdict} against 'random': log loss "
            f"{interval_text(spreads[1], '.5f')}, AUC {interval_text(spreads[0], '.4f')}."
        )
    return said
