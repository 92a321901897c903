"""Turns a plan into tables for the terminal and the sentence that says whether the run fits."""

from collections.abc import Sequence

import rich.table
from rich import box
from rich.text import Text

from lc_spark import plan_advice
from lc_spark.plan import GB, HEAP_SHARE, Plan

LARGEST = 10  # fields that are shown


def all_tables(plan: Plan) -> list[rich.table.Table]:
    """Return rows and features, the largest fields, the systems, and the stages."""
    return [_data(plan), _fields(plan), _systems(plan), _stages(plan)]


def _table(title: str, columns: Sequence[str], caption: str = "") -> rich.table.Table:
    """Return a table; the columns but the first are numbers."""
    table = rich.table.Table(title=title, box=box.SIMPLE_HEAD, caption=caption or None)
    table.add_column(columns[0], no_wrap=True)
    for heading in columns[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _data(plan: Plan) -> rich.table.Table:
    trial, fields = plan.trial, plan.trial.fields
    low, high = fields.d_between()
    n_continuous = sum(info.kind == "continuous" for info in plan.field_map.fields)
    exact = fields.sample_rows >= fields.train_rows
    table = _table(f"{plan.config.name}: what there will be", ("", "number", ""))
    for name, n in (
        ("source rows", trial.source_rows),
        *((f"rejected: {reason}", n) for reason, n in trial.rejected.items()),
        *((f"{split} rows", n) for split, n in trial.split_rows.items()),
        ("fields", len(plan.field_map.fields)),
        ("of them continuous", n_continuous),
    ):
        table.add_row(Text(name), f"{n:,}", "counted" if "rows" in name or ":" in name else "")
    how = "counted on all train rows" if exact else f"{low:,} to {high:,}"
    table.add_row("features d", f"{plan.field_map.d:,}", how, style="bold")
    if not exact:
        table.caption = (
            f"d is an estimate from {fields.sample_rows:,} of {fields.train_rows:,} train rows."
        )
    return table


def _fields(plan: Plan) -> rich.table.Table:
    table = _table("The largest fields", ("field", "kind", "features", "between"))
    for info in sorted(plan.field_map.fields, key=lambda info: -info.size)[:LARGEST]:
        estimate = plan.trial.fields.vocabularies.get(info.name)
        between = "" if estimate is None else f"{2 + estimate.low:,.0f} to {2 + estimate.high:,.0f}"
        table.add_row(info.name, info.kind, f"{info.size:,}", between)
    return table


def _systems(plan: Plan) -> rich.table.Table:
    table = _table("Systems", ("system", "parameters", "GB a rank", "about seconds"))
    seconds = plan.seconds()
    for system in plan.config.systems:
        count = f"{plan.parameters(system).total:,}"
        if system.system == "lr":
            table.add_row(system.name, count, "", f"{seconds['train_lr']:,.0f}")
            continue
        held = f"{(plan.machine.rank_bytes + plan.rank_bytes(system)) / GB:,.2f}"
        table.add_row(system.name, count, held, f"{plan.training_seconds(system):,.0f}")
    return table


def _stages(plan: Plan) -> rich.table.Table:
    memory, disk, seconds = plan.memory(), plan.disk(), plan.seconds()
    table = _table(
        "What each stage will take",
        ("stage", "about seconds", "memory, GB", "disk, GB"),
        f"Seconds, roughly, by what was measured here on {plan.trial.timed_rows:,} rows, without "
        f"the starts of most stages: LR by {plan.lr_by} with all of its passes, networks with all "
        "epochs. Memory, at most, of one machine that runs everything.",
    )
    for stage, parts in memory.items():
        table.add_row(
            stage,
            f"{seconds[stage]:,.0f}",
            f"{sum(parts.values()) / GB:,.1f}",
            f"{disk[stage] / GB:,.3f}" if stage in disk else "",
        )
    most = max(sum(parts.values()) for parts in memory.values()) / GB
    total = f"{sum(seconds.values()):,.0f}"
    table.add_row(
        "together", total, f"{most:,.1f}", f"{sum(disk.values()) / GB:,.3f}", style="bold"
    )
    return table


def sentence(plan: Plan) -> str:
    """Say whether the run fits this machine, and what to change when it does not."""
    if plan.problem():
        return f"Does not fit: {plan.problem()}. {plan_advice.advice(plan)}"
    memory = max(sum(parts.values()) for parts in plan.memory().values())
    disk = sum(plan.disk().values())
    free = "" if plan.machine.disk is None else f" of {plan.machine.disk / GB:,.1f} free"
    return (
        f"Fits: at most {memory / GB:,.1f} GB of this machine's {plan.machine.memory / GB:,.1f} GB "
        f"of memory, and {disk / GB:,.3f} GB of disk{free}."
    )


def remarks(plan: Plan) -> list[str]:
    """Return what the plan leaves out for this config."""
    said = []
    rejected, allowed = sum(plan.trial.rejected.values()), plan.config.source.max_rejected
    if rejected > allowed * plan.trial.source_rows:
        said.append(
            f"Ingest would end: {rejected:,} of {plan.trial.source_rows:,} rows would be rejected, "
            f"more than source.max_rejected = {allowed}."
        )
    if plan.config.features.crosses == "auto":
        said.append(
            f"The crosses that 'features.crosses: auto' adds ({plan.config.features.number} at "
            "most) are in no number here, nor is their search "
            f"({plan.config.features.seconds} s at most)."
        )
    room = HEAP_SHARE * (plan.heap - plan.lr_heap)
    if plan.lr_by == "mllib" and plan.lr_rows > room > 0:
        said.append(
            f"LR's train rows take {plan.lr_rows / GB:,.1f} GB, spark.driver_memory leaves "
            f"{room / GB:,.1f} GB for them: the rest is read from disk in every pass."
        )
    if not (plan.config.spark.master or "local").startswith("local"):
        said.append("The memory of executors on other machines is not looked at.")
    if plan.config.split.by == "window":
        said.append("All days of the window are counted: a later day ingests its own rows alone.")
    return said
