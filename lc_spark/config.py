"""Turns one YAML file, plus ``key=value`` overrides, into checked, typed settings."""

import datetime
import hashlib
import json
import keyword
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lc_spark.errors import LcSparkError, nearest

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
PositiveInt = Annotated[int, Field(gt=0)]

# Columns that the shards carry beside the fields.
RESERVED_NAMES = ("label", "row_id", "fold", "split", "part", "date")


class Section(BaseModel):
    """A part of the config; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(Section):
    """Where raw rows come from and which of them are usable."""

    path: str | None = Field(
        None, description="file or folder; {date} in it stands for the day of the run"
    )
    dataset: Literal["flights"] | None = Field(None, description="a data set that ships as package")
    format: Literal["parquet", "csv", "json", "delta"] = "parquet"
    date: str | None = Field(None, description="column or SQL expression of the row's day")
    row_id: tuple[str, ...] = Field(
        (), description="columns that identify a row; default: all columns"
    )
    types: dict[str, str] = Field(
        {}, description="SQL types of columns that are no numeric field (CSV reads strings)"
    )
    reject: dict[str, str] = Field({}, description="reason -> SQL condition of rows to set aside")
    max_rejected: Fraction = Field(0.05, description="more rejected rows than this fail the job")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either 'path' or 'dataset'")
        if "{date}" in (self.path or "") and self.date is None:
            raise ValueError("{date} in 'path' needs 'date', the day that a row itself names")
        return self


class SplitByHash(Section):
    """Rows to splits by a seeded hash of the row id."""

    by: Literal["hash"]
    valid: Share = 0.1
    test: Share = 0.2

    @model_validator(mode="after")
    def _leaves_train_rows(self) -> Self:
        if self.valid + self.test >= 1:
            raise ValueError("valid + test must stay below 1, or no row is left to train on")
        return self


class SplitByDate(Section):
    """Rows to splits by day: train before valid_from, test from test_from on."""

    by: Literal["date"]
    valid_from: datetime.date
    test_from: datetime.date

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.valid_from >= self.test_from:
            raise ValueError("valid_from must be before test_from")
        return self


SPLITS: dict[str, type[Section]] = {"hash": SplitByHash, "date": SplitByDate}


class FieldBase(Section):
    """What every kind of field has."""

    name: Name


class ColumnField(FieldBase):
    """A field that reads one raw column (default: the column of its own name)."""

    column: str = ""

    @model_validator(mode="before")
    @classmethod
    def _column_defaults_to_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("column") and "name" in data:
            return {**data, "column": data.get("name")}
        return data


class Categorical(ColumnField):
    """One value of a set; values seen less than min_count times share one index."""

    kind: Literal["categorical"]
    min_count: PositiveInt = 2
    hashed: PositiveInt | None = Field(None, description="fixed number of indices, no vocabulary")


class Multivalued(ColumnField):
    """A set of values a row: an array column, or a string with a delimiter."""

    kind: Literal["multivalued"]
    delimiter: str | None = Field(None, min_length=1)
    max_values: PositiveInt = Field(16, description="values kept a row, the most frequent first")
    min_count: PositiveInt = 2
    hashed: PositiveInt | None = Field(None, description="fixed number of indices, no vocabulary")


class Bucketed(ColumnField):
    """A number cut into buckets."""

    kind: Literal["bucketed"]
    by: Literal["quantile", "uniform", "log_squared", "cut_points"] = "quantile"
    buckets: Annotated[int, Field(ge=1, le=65_536)] = 20
    cut_points: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _cut_points_ascend(self) -> Self:
        if (self.by == "cut_points") != bool(self.cut_points):
            raise ValueError("'cut_points' goes with 'by: cut_points', and only with it")
        pairs = zip(self.cut_points, self.cut_points[1:], strict=False)
        if not all(a < b for a, b in pairs):
            raise ValueError("cut_points must ascend strictly")
        return self


class Continuous(ColumnField):
    """A number used as it is, standardised: weight times value."""

    kind: Literal["continuous"]


class Crossed(FieldBase):
    """A field made of two or more others, by their indices."""

    kind: Literal["crossed"]
    of: Annotated[tuple[str, ...], Field(min_length=2)]
    min_count: PositiveInt = 5
    hashed: PositiveInt | None = Field(None, description="fixed number of indices, no vocabulary")

    @model_validator(mode="before")
    @classmethod
    def _name_from_parents(cls, data: Any) -> Any:
        if isinstance(data, dict) and "name" not in data and isinstance(data.get("of"), list):
            return {**data, "name": "_x_".join(map(str, data["of"]))}
        return data


KINDS: dict[str, type[FieldBase]] = {
    "categorical": Categorical,
    "multivalued": Multivalued,
    "bucketed": Bucketed,
    "continuous": Continuous,
    "crossed": Crossed,
}
AnyField = Annotated[
    Categorical | Multivalued | Bucketed | Continuous | Crossed, Field(discriminator="kind")
]


class Shards(Section):
    """How encoded rows lie on disk."""

    rows_per_group: PositiveInt = 32_768
    folds: Annotated[int, Field(ge=2, le=1000)] = 5


class Lr(Section):
    """MLlib LogisticRegression; l2 is its regParam (a row's mean loss + l2 / 2 |w|^2)."""

    l2: Annotated[float, Field(ge=0)] = 1e-5
    max_iterations: PositiveInt = 100
    tolerance: Annotated[float, Field(gt=0)] = 1e-6


class Training(Section):
    """The torch loop; every key may be set again in an entry of `systems`."""

    ranks: PositiveInt = 2
    epochs: PositiveInt = 5
    batch_size: PositiveInt = Field(512, description="rows a rank and step")
    hidden: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (256, 128)
    channels: PositiveInt = Field(1, description="values a field in the locally connected layer")
    start: Literal["lr", "random", "frozen"] = Field(
        "lr", description="M1: from LR, random, or from LR and kept as it is"
    )
    batch_norm: bool = True
    dropout: Fraction = 0.0
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="of the MLP (AdamW)")
    m1_learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    m1_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    patience: PositiveInt = Field(2, description="epochs without a better validation AUC")
    precision: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"


class System(Section):
    """One line of the result table; `training` holds what differs from the common settings."""

    system: Literal["lr", "lc_dnn", "lc_wd"]
    name: Name = ""
    training: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: Any) -> Any:
        data = {"system": data} if isinstance(data, str) else data
        if isinstance(data, dict) and not data.get("name"):
            return {**data, "name": data.get("system")}
        return data

    @field_validator("training")
    @classmethod
    def _known_settings(cls, value: dict[str, Any]) -> dict[str, Any]:
        Training.model_validate(value)
        return value


class Evaluation(Section):
    """What the test split is judged by, beside the standard metrics."""

    group: str | None = Field(None, description="raw column; AUC is averaged over its values")


class Tracking(Section):
    """MLflow: default is an SQLite store in the workspace."""

    uri: str | None = None
    experiment: str = "lc_spark"
    model_name: str = Field("", description="registered name; default: the config's name")


class Spark(Section):
    """The session when the program starts Spark itself; spark-submit's own settings win."""

    master: str = Field("", description="default: local[N], N = cores, at least the ranks")
    driver_memory: str = Field("4g", pattern=r"^\d+[gm]$")
    settings: dict[str, str] = {}


class Config(Section):
    """Everything that one data set's pipeline needs."""

    name: Name
    workspace: str
    seed: int = 0
    source: Source
    label: str = Field(description="column or SQL expression: 0/1 or true/false")
    split: Annotated[SplitByHash | SplitByDate, Field(discriminator="by")]
    fields: Annotated[tuple[AnyField, ...], Field(min_length=1)]
    shards: Shards = Shards()
    lr: Lr = Lr()
    training: Training = Training()
    systems: Annotated[tuple[System, ...], Field(min_length=1)]
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    spark: Spark = Spark()

    @field_validator("workspace")
    @classmethod
    def _local_workspace(cls, value: str) -> str:
        if "://" in value:
            raise ValueError("must be a folder path that driver and executors share, not a URI")
        return value

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        names = [field.name for field in self.fields]
        for what, used in (("field", names), ("system", [s.name for s in self.systems])):
            # Spark does not tell 'Site' from 'site'.
            twice = [name for name, n in Counter(map(str.lower, used)).items() if n > 1]
            if twice:
                raise ValueError(f"two {what}s are named '{twice[0]}'; give one another name")
        for field in self.fields:
            # petastorm makes a namedtuple of the names, which takes neither _x nor Python's words.
            kept = field.name.lower() in RESERVED_NAMES or keyword.iskeyword(field.name)
            if kept or field.name.startswith("_"):
                raise ValueError(
                    f"a field cannot be named '{field.name}' (kept for {', '.join(RESERVED_NAMES)},"
                    " Python's keywords and names that begin with _): set 'name' and 'column'"
                )
            if isinstance(field, Crossed):
                self._check_cross(field)
        if self.split.by == "date" and self.source.date is None:
            raise ValueError("split by date needs source.date")
        for system in self.systems:
            if system.name.lower() == "lr" and system.system != "lr":
                raise ValueError(f"the name 'lr' is kept for LR itself, not for a {system.system}")
        return self

    def _check_cross(self, cross: Crossed) -> None:
        allowed = [f.name for f in self.fields if f.kind in ("categorical", "bucketed")]
        for parent in cross.of:
            if parent not in allowed:
                raise ValueError(
                    f"the cross '{cross.name}' names '{parent}', which is no categorical or "
                    f"bucketed field.{nearest(parent, allowed)} Allowed: {', '.join(allowed)}"
                )
        if len(set(cross.of)) < len(cross.of):
            raise ValueError(f"the cross '{cross.name}' names a field twice")

    def training_of(self, system: System) -> Training:
        """Return the common training settings with the system's own ones on top."""
        return Training.model_validate({**self.training.model_dump(), **system.training})

    @property
    def workspace_path(self) -> Path:
        """The workspace as an absolute path."""
        return Path(self.workspace).resolve()

    @property
    def model_name(self) -> str:
        """The name of the registered model."""
        return self.tracking.model_name or self.name

    def canonical_json(self) -> str:
        """Return the settings as JSON that is the same for the same settings."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    def digest(self) -> str:
        """Return 16 hex digits that change with any setting."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()[:16]


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML config and apply overrides like ``training.epochs=3``.

    Raises LcSparkError with the key, the value and what is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise LcSparkError(f"There is no config file '{path}'.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LcSparkError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise LcSparkError(f"{path} must hold keys and values, such as 'name: flights'.")
    for override in overrides or []:
        _apply_override(data, override)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise LcSparkError(f"{path}:\n" + "\n".join(_sentences(error))) from error


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
    section = Config.model_fields[str(loc[0])].annotation
    assert isinstance(section, type), "every other section is one model"
    return section


def schema() -> dict[str, Any]:
    """Return the JSON schema of the config, for editors."""
    return Config.model_json_schema()
