"""The settings of a pipeline, typed and checked; config_file reads them from YAML."""

import datetime
import hashlib
import json
import keyword
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lc_spark.cells import cells_of
from lc_spark.daily_settings import Gate, Refresh
from lc_spark.errors import LcSparkError, nearest
from lc_spark.field_kinds import AnyField, Crossed, Name, PositiveInt, Section
from lc_spark.files import AnyPath, as_path
from lc_spark.source_settings import Source
from lc_spark.systems import FIXED, Experiment, Lr, System, Training

Share = Annotated[float, Field(gt=0, lt=1)]

# Columns that the shards carry beside the fields.
RESERVED_NAMES = ("label", "row_id", "fold", "split", "part", "date")


class HashShares(Section):
    """Rows to splits by a seeded hash of the row id."""

    valid: Share = 0.1
    test: Share = 0.2

    @model_validator(mode="after")
    def _leaves_train_rows(self) -> Self:
        if self.valid + self.test >= 1:
            raise ValueError("valid + test must stay below 1, or no row is left to train on")
        return self


class SplitByHash(HashShares):
    """Every row of the source to a split by its hash."""

    by: Literal["hash"]


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


class SplitByWindow(HashShares):
    """The rows of the run's day and of those before it to splits by their hash.

    A row stays in its split from day to day: no model has trained on what an earlier or a later one
    is tested on, so the two can be compared there.
    """

    by: Literal["window"]
    days: PositiveInt = Field(28, description="days that a run sees, its own the last")


SPLITS: dict[str, type[Section]] = {
    "hash": SplitByHash,
    "date": SplitByDate,
    "window": SplitByWindow,
}


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
    workspace: str = Field(
        description="folder, or URI such as s3a://bucket/folder, that driver and executors share"
    )
    seed: int = 0
    day: datetime.date | None = Field(None, description="the day of the run; --date sets it")
    source: Source
    label: str = Field(description="column or SQL expression: 0/1 or true/false")
    split: Annotated[SplitByHash | SplitByDate | SplitByWindow, Field(discriminator="by")]
    fields: Annotated[tuple[AnyField, ...], Field(min_length=1)]
    features: Features = Features()
    refresh: Refresh = Refresh()
    shards: Shards = Shards()
    lr: Lr = Lr()
    training: Training = Training()
    systems: Annotated[tuple[System, ...], Field(min_length=1)]
    experiment: Experiment = Experiment()
    evaluation: Evaluation = Evaluation()
    gate: Gate = Gate()
    scoring: Scoring = Scoring()
    tracking: Tracking = Tracking()
    spark: Spark = Spark()

    @model_validator(mode="after")
    def _runs_have_a_store(self) -> Self:
        if not isinstance(self.workspace_path, Path) and not self.tracking.uri:
            raise ValueError(
                f"the workspace {self.workspace} is no local folder, where MLflow could keep its "
                "SQLite store: set tracking.uri to an MLflow server"
            )
        return self

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
        if self.refresh.mode == "append":
            if self.features.crosses == "auto":
                raise ValueError("refresh.mode: append goes with 'features: {crosses: listed}'")
            for system in self.systems:
                training = self.training_of(system)
                if training.joint_epochs or training.start == "lr_past":
                    raise ValueError(
                        f"{system.name}: refresh.mode: append goes neither with joint_epochs nor "
                        "with start: lr_past"
                    )
        if self.features.crosses == "auto" and len(self._crossable) < 2:
            raise ValueError(
                "features.crosses: auto needs two categorical or bucketed fields at least, 'fields'"
                f" has {len(self._crossable)}: add fields, or leave it at 'listed'"
            )
        if self.split.by in ("date", "window") and self.source.date is None:
            raise ValueError(f"split by {self.split.by} needs source.date")
        if self.refresh != Refresh() and self.split.by != "window":
            raise ValueError("'refresh' is for runs by the day: set 'split: {by: window, ...}'")
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
    def workspace_path(self) -> AnyPath:
        """The workspace: an absolute path, or a UPath for a URI."""
        return as_path(self.workspace)

    @property
    def run_path(self) -> AnyPath:
        """Where the files of a run lie: in the workspace, or in its folder of the run's day."""
        if self.split.by != "window":
            return self.workspace_path
        if self.day is None:
            raise LcSparkError("A split by window is of one day's run: give --date.")
        return self.workspace_path / "days" / self.day.isoformat()

    def for_day(self, day: datetime.date | None) -> Self:
        """Return the config of a run for a day; None leaves it as it is."""
        return self if day is None else self.model_copy(update={"day": day})

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
