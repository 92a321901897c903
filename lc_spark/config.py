"""The settings of a pipeline, typed and checked; config_file reads them from YAML."""

import datetime
import hashlib
import json
import keyword
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from lc_spark.cells import cells_of
from lc_spark.errors import nearest
from lc_spark.field_kinds import AnyField, Crossed, Fraction, Name, PositiveInt, Section
from lc_spark.systems import FIXED, Experiment, Lr, System, Training

Share = Annotated[float, Field(gt=0, lt=1)]

# Columns that the shards carry beside the fields.
RESERVED_NAMES = ("label", "row_id", "fold", "split", "part", "date")


class Files(Section):
    """How files are read."""

    format: Literal["parquet", "csv", "json", "delta"] = "parquet"
    delimiter: str = Field(",", min_length=1, description="csv: what is between two columns")
    quote: str = Field(
        '"', max_length=1, description="csv: around a text; '' where it is a letter as any other"
    )
    columns: tuple[str, ...] = Field(
        (), description="csv: names of all columns, where the files have no header line"
    )

    @model_validator(mode="after")
    def _csv_alone(self) -> Self:
        if self.format != "csv":
            for key in ("delimiter", "quote", "columns"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"'{key}' goes with 'format: csv', and only with it")
        twice = [name for name, n in Counter(map(str.lower, self.columns)).items() if n > 1]
        if twice:
            raise ValueError(f"'columns' names '{twice[0]}' twice")
        return self


class Joined(Files):
    """A table whose columns each row of the source gets; a row without a match gets nulls."""

    path: str
    keys: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="columns that both have, and that occur once in this table"
    )


class Source(Files):
    """Where raw rows come from and which of them are usable."""

    path: str | None = Field(
        None, description="file or folder; {date} in it stands for the day of the run"
    )
    dataset: Literal["flights", "synthetic"] | None = Field(
        None, description="a data set that lc_spark makes itself"
    )
    join: dict[str, Joined] = Field({}, description="name -> a table joined to the rows")
    date: str | None = Field(None, description="column or SQL expression of the row's day")
    row_id: tuple[str, ...] = Field(
        (), description="columns that identify a row; default: all columns"
    )
    types: dict[str, str] = Field(
        {}, description="SQL types of columns that are no numeric field (CSV reads strings)"
    )
    derive: dict[Name, str] = Field(
        {},
        description="new column -> SQL expression of the others. It is a column of raw like any "
        "other: who calls the registered model gives it too",
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


class Shards(Section):
    """How encoded rows lie on disk."""

    rows_per_group: PositiveInt = 32_768
    folds: Annotated[int, Field(ge=2, le=1000)] = 5


class Features(Section):
    """Which crosses there are beside those that `fields` lists."""

    crosses: Literal["listed", "auto"] = Field(
        "listed", description="auto: add the pairs of fields that say more than their parts"
    )
    number: PositiveInt = Field(5, description="pairs that auto adds at the most")
    sample_rows: PositiveInt = Field(200_000, description="train rows that pairs are judged on")
    seconds: PositiveInt = Field(300, description="no further pair is tried after so long")


class Evaluation(Section):
    """What the test split is judged by, beside the standard metrics."""

    group: str | None = Field(None, description="raw column; AUC is averaged over its values")
    truth: str | None = Field(
        None, description="raw column with the true probability, where a made-up log has one"
    )


class Scoring(Section):
    """When scored rows differ so much from the train rows that somebody should look."""

    # 0.1 and 0.2 are the usual steps (Wu and Olson 2010, J. Oper. Res. Soc. 61(2)).
    psi: Annotated[float, Field(gt=0)] = Field(
        0.2, description="warn of a field whose population stability index is above"
    )


class Tracking(Section):
    """MLflow: default is an SQLite store in the workspace."""

    uri: str | None = None
    experiment: str = "lc_spark"
    model_name: str = Field("", description="registered name; default: the config's name")


class Spark(Section):
    """The session when the program starts Spark itself; spark-submit's own settings win."""

    master: str = Field("", description="default: local[N], N = cores, at least the ranks")
    driver_memory: str = Field("4g", pattern=r"^\d+[gm]$")
    settings: dict[str, str] = Field({}, description="Spark settings by name")


class Config(Section):
    """Everything that one data set's pipeline needs."""

    name: Name
    workspace: str
    seed: int = 0
    source: Source
    label: str = Field(description="column or SQL expression: 0/1 or true/false")
    split: Annotated[SplitByHash | SplitByDate, Field(discriminator="by")]
    fields: Annotated[tuple[AnyField, ...], Field(min_length=1)]
    features: Features = Features()
    shards: Shards = Shards()
    lr: Lr = Lr()
    training: Training = Training()
    systems: Annotated[tuple[System, ...], Field(min_length=1)]
    experiment: Experiment = Experiment()
    evaluation: Evaluation = Evaluation()
    scoring: Scoring = Scoring()
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
            elif field.column.lower() == (self.evaluation.truth or "").lower():
                raise ValueError(
                    f"the field '{field.name}' reads '{field.column}', the true probability that "
                    "evaluation.truth names: take it out of the fields"
                )
        if self.features.crosses == "auto" and len(self._crossable) < 2:
            raise ValueError(
                "features.crosses: auto needs two categorical or bucketed fields at least, 'fields'"
                f" has {len(self._crossable)}: add fields, or leave it at 'listed'"
            )
        if self.split.by == "date" and self.source.date is None:
            raise ValueError("split by date needs source.date")
        for system in self.systems:
            if system.name.lower() == "lr" and system.system != "lr":
                raise ValueError(f"the name 'lr' is kept for LR itself, not for a {system.system}")
            if system.name.startswith(("lr_fold_", "lr_past_")):
                raise ValueError(f"'{system.name}': names like this are kept for the LRs of starts")
            self._check_training(system.name, self.training_of(system))
        cells = cells_of(self.systems, self.experiment)
        runs = Counter(cell.system.name.lower() for cell in cells)
        for name, n in runs.items():
            if n > 1:
                raise ValueError(f"experiment: two runs are named '{name}': rename one")
        for cell in cells:
            self._check_training(f"experiment: {cell.line}", self.training_of(cell.system))
        return self

    def _check_training(self, who: str, training: Training) -> None:
        if training.start == "lr_past" and self.source.date is None:
            raise ValueError(f"{who}: start lr_past needs source.date")
        if training.start == "lr_past" and training.days is None:
            raise ValueError(f"{who}: start lr_past needs 'days', the last train days")
        if training.joint_epochs >= training.epochs:
            raise ValueError(
                f"{who}: joint_epochs ({training.joint_epochs}) must stay below epochs "
                f"({training.epochs})"
            )

    @property
    def _crossable(self) -> list[str]:
        return [f.name for f in self.fields if f.kind in ("categorical", "bucketed")]

    def _check_cross(self, cross: Crossed) -> None:
        allowed = self._crossable
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
        fixed = FIXED.get(system.system, {})
        return Training.model_validate({**self.training.model_dump(), **system.training, **fixed})

    @property
    def most_ranks(self) -> int:
        """The largest number of ranks that a system trains with."""
        return max(self.training_of(system).ranks for system in self.systems)

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
