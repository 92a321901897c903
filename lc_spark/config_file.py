"""Turns one YAML file, plus ``key=value`` overrides, into a Config, or into errors that help."""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lc_spark.config import SPLITS, Config
from lc_spark.errors import LcSparkError, nearest
from lc_spark.field_kinds import KINDS
from lc_spark.source_settings import Joined
from lc_spark.systems import System, Training, Variant


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML config and apply overrides like ``training.epochs=3``.

    Raises LcSparkError with the key, the value and what is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise LcSparkError(f"There is no config file '{path}'.")
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LcSparkError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise LcSparkError(f"{path} must hold keys and values, such as 'name: flights'.")
    _refuse_double_keys(path, text)
    for override in overrides or []:
        _apply_override(data, override)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise LcSparkError(f"{path}:\n" + "\n".join(_sentences(error))) from error


def _refuse_double_keys(path: Path, text: str) -> None:
    """Raise LcSparkError where a section has a key twice: YAML would take the last of the two."""
    waiting, known = [yaml.compose(text, yaml.SafeLoader)], set()
    while waiting:
        node = waiting.pop()
        if id(node) in known:  # an alias
            continue
        known.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        if not isinstance(node, yaml.MappingNode):
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:  # a key that is a list was refused by safe_load
            line = key.start_mark.line + 1
            if key.value in lines:
                raise LcSparkError(
                    f"{path}, line {line}: the key '{key.value}' stands there for the second time, "
                    f"after line {lines[key.value]}: keep one of the two."
                )
            lines[key.value] = line
            waiting.append(value)


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise LcSparkError(f"--set {override}: write it as key=value, such as training.epochs=3")
    *parents, last = key.split(".")
    node: Any = data
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise LcSparkError(f"--set {override}: '{parent}' holds a value, not keys")
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise LcSparkError(f"--set {override}: '{value}' is not valid YAML: {error}") from error


def _sentences(error: ValidationError) -> list[str]:
    """Say each problem in one line: the key, the value, what is allowed."""
    problems = error.errors()
    places = [problem["loc"] for problem in problems]
    lines = []
    for problem in problems:
        loc, kind, context = problem["loc"], problem["type"], problem.get("ctx", {})
        deeper = any(place[: len(loc)] == loc and place != loc for place in places)
        if kind == "too_short" and deeper:
            continue  # only what follows from the problem inside
        where = _place(loc)
        said = problem["msg"].replace("valid tuple", "list").replace("Tuple", "List")
        message = f"is {problem['input']!r}: {said}"
        if kind == "extra_forbidden":
            section = list(_section_at(loc[:-1]).model_fields)
            message = f"is not a key that is known here.{nearest(str(loc[-1]), section)}"
            message += f" Allowed: {', '.join(section)}"
        elif kind in ("union_tag_invalid", "union_tag_not_found"):
            where += "." + context["discriminator"].strip("'")
            allowed = list(SPLITS if loc[0] == "split" else KINDS)
            tag = context.get("tag")
            message = (
                "is needed and missing." if tag is None else f"is '{tag}'.{nearest(tag, allowed)}"
            )
            message += f" Allowed: {', '.join(allowed)}"
        elif kind == "missing":
            message = "is needed and missing"
        elif kind == "value_error":
            message = problem["msg"].removeprefix("Value error, ")
        elif kind == "literal_error":
            message += "." + nearest(str(problem["input"]), re.findall("'(.*?)'", problem["msg"]))
        elif kind == "model_type":
            message = f"is {problem['input']!r}: it must hold keys and values"
        lines.append(f"  {where or 'config'}: {message}")
    return lines


def _place(loc: tuple[int | str, ...]) -> str:
    """Return the person's own keys; pydantic adds the tag of a union to them."""
    tag_at = {"fields": 2, "split": 1}.get(str(loc[0]) if loc else "")
    return ".".join(str(part) for i, part in enumerate(loc) if i != tag_at)


def _section_at(loc: tuple[int | str, ...]) -> type[BaseModel]:
    """Return the config section at a place of a pydantic error."""
    if not loc:
        return Config
    if loc[0] == "fields":
        return KINDS[str(loc[2])]
    if loc[0] == "split":
        return SPLITS[str(loc[1])]
    if loc[0] == "systems":
        return Training if "training" in loc else System
    if loc[:2] in (("experiment", "systems"), ("experiment", "starts")) and len(loc) > 2:
        entry = System if loc[1] == "systems" else Variant
        return Training if "training" in loc else entry
    if loc[:2] == ("source", "join") and len(loc) > 2:
        return Joined
    section = Config.model_fields[str(loc[0])].annotation
    assert isinstance(section, type), "every other section is one model"
    return section


def schema() -> dict[str, Any]:
    """Return the JSON schema of the config, for editors."""
    return Config.model_json_schema()
