"""Finds what to change in a config whose run would not fit the machine."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

from lc_spark.config import Config
from lc_spark.field_map import FieldMap
from lc_spark.plan import Plan

Changes = Mapping[str, Mapping[str, object]]


def advice(plan: Plan) -> str:
    """Return the first change with which the run fits, as an order; empty where it fits."""
    if not plan.problem():
        return ""
    for words, tried in _changes(plan):
        if not tried.problem():
            return words
    return (
        "Take a larger machine or a cluster, fewer rows (source.path, split), or a larger disk "
        "(workspace): no single setting is enough."
    )


def changed(plan: Plan, changes: Changes, systems: list[dict[str, object]] | None = None) -> Plan:
    """Return the plan with other values of some sections' keys, and other systems if given."""
    settings = plan.config.model_dump()
    for section, keys in changes.items():
        settings[section] = {**settings[section], **keys}
    if systems is not None:
        settings["systems"] = systems
    return dataclasses.replace(plan, config=Config.model_validate(settings))


def _changes(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Yield changes from the mildest on, the last with room for LR as well."""
    heap = max(2, math.ceil(1.1 * plan.lr_heap / 2**30))
    for_lr: list[tuple[str, Plan]] = []
    if plan.lr_by == "mllib":
        roomy = changed(plan, {"spark": {"driver_memory": f"{heap}g"}})
        for_lr += [(f"Set spark.driver_memory to {heap}g", roomy)]
        for_lr += [("Set lr.by to torch", changed(plan, {"lr": {"by": "torch"}}))]
    yield from ((f"{words}.", tried) for words, tried in for_lr)
    yield from _smaller(plan, "")
    for words, tried in for_lr:
        yield from _smaller(tried, f"{words} and ")


def _smaller(plan: Plan, first: str) -> Iterator[tuple[str, Plan]]:
    def said(text: str) -> str:
        return f"{first}{text}" if first else text[0].upper() + text[1:]

    ranks = plan.config.most_ranks
    for fewer in range(ranks - 1, 0, -1):
        systems = [s.model_dump() for s in plan.config.systems]
        for system in systems:
            system["training"].pop("ranks", None)
        tried = changed(plan, {"training": {"ranks": fewer}}, systems)
        yield said(f"lower training.ranks to {fewer} (now {ranks})."), tried
    by_size = sorted(plan.networks, key=plan.rank_bytes, reverse=True)
    for n in range(1, len(by_size) + 1):
        out = {system.name for system in by_size[:n]}
        left = [s.model_dump() for s in plan.config.systems if s.name not in out]
        if left:
            names = ", ".join(f"'{name}'" for name in sorted(out))
            yield said(f"take {names} out of systems."), changed(plan, {}, left)
    largest = max(plan.field_map.fields, key=lambda info: info.size)
    slots = 2 ** max(10, int(math.log2(max(largest.size, 2))))
    while slots > 1024:
        slots //= 2
        if slots + 1 < largest.size:
            infos = [
                dataclasses.replace(i, size=slots + 1, hashed=slots) if i is largest else i
                for i in plan.field_map.fields
            ]
            yield (
                said(
                    f"raise min_count of the field '{largest.name}' ({largest.size:,} "
                    f"features), or hash it (hashed: {slots})."
                ),
                dataclasses.replace(plan, field_map=FieldMap(tuple(infos))),
            )
