"""Turns systems, starts and seeds into the runs of an experiment."""

from collections.abc import Sequence
from dataclasses import dataclass

from lc_spark.systems import LC_SYSTEMS, Experiment, System, Variant


@dataclass(frozen=True)
class Cell:
    """One run of an experiment: a system of its own name, with a start and a seed."""

    system: System
    label: str  # the system's name in the config
    start: str  # the variant's name; empty where none is crossed with the system
    seed: int | None  # None for LR, which has none

    @property
    def line(self) -> str:
        """The line of the tables that it belongs to, with the other seeds."""
        return f"{self.label}, {self.start}" if self.start else self.label


def cells_of(systems: Sequence[System], experiment: Experiment) -> list[Cell]:
    """Return every run of an experiment; LR, which has no seed, is one and comes first."""
    listed = experiment.systems or systems
    lr = next((system for system in listed if system.system == "lr"), System(system="lr"))
    found = [Cell(lr, lr.name, "", None)]
    for system in listed:
        if system.system == "lr":
            continue
        crossed = system.system in LC_SYSTEMS and "start" not in system.training
        variants: Sequence[Variant | None] = experiment.starts if crossed else ()
        for variant in variants or (None,):
            found += [_cell(system, variant, seed) for seed in experiment.seeds]
    return found


def _cell(system: System, variant: Variant | None, seed: int) -> Cell:
    parts = [system.name, *([variant.name] if variant else []), f"seed{seed}"]
    training = {**(variant.training if variant else {}), **system.training}
    own = System(system=system.system, name="_".join(parts), training=training)
    return Cell(own, system.name, variant.name if variant else "", seed)
