"""The systems that can be trained, how, and which of them an experiment compares, as settings."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from lc_spark.field_kinds import Fraction, Name, PositiveInt, Section

Regularisation = Annotated[float, Field(ge=0)]

# The systems of the paper, its networks of the LC family first; wide_deep is LC-W&D with k = 16
# and a random start, under the name that people look for.
SystemKind = Literal["lr", "lr_equivalent", "dnn", "lc_dnn", "lc_wd", "lc_resnet", "wide_deep"]
LC_SYSTEMS = ("lc_dnn", "lc_wd", "lc_resnet")  # those that `start` and `channels` are for
FIXED: dict[str, dict[str, Any]] = {
    "lr": {"start": "lr", "channels": 1},
    "lr_equivalent": {"start": "lr", "channels": 1},
    "dnn": {"start": "random", "channels": 1},
    "wide_deep": {"start": "random", "channels": 16},
}

# Where M1 begins. lr: the paper, LR of the rows that the network then trains on. frozen: the same,
# and M1 stays so. lr_cross_fitted: a row meets weights of an LR that has not seen its fold.
# lr_past: LR of the days before those that the network trains on.
Start = Literal["lr", "random", "frozen", "lr_cross_fitted", "lr_past"]
HELD_OUT = ("lr_cross_fitted", "lr_past")


class Lr(Section):
    """Logistic regression; l2 is MLlib's regParam (a row's mean loss + l2 / 2 |w|^2)."""

    by: Literal["mllib", "torch", "auto"] = Field(
        "mllib",
        description="mllib: L-BFGS, of which the driver holds some 260 bytes a feature; torch: all "
        "LRs of the config at once by the torch loop, for more features than that; auto: torch "
        "where MLlib's share does not fit into the driver's memory",
    )
    l2: Annotated[tuple[Regularisation, ...], Field(min_length=1)] = Field(
        (1e-6, 1e-5, 1e-4, 1e-3), description="of several, validation log loss chooses"
    )
    max_iterations: PositiveInt = Field(100, description="by mllib")
    tolerance: Annotated[float, Field(gt=0)] = Field(1e-6, description="by mllib")
    epochs: PositiveInt = Field(2, description="by torch: passes over the train rows")
    batch_size: PositiveInt = Field(1024, description="by torch: rows a rank and step")
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        0.2, description="by torch: a weight's first step, in logits; later ones are shorter"
    )

    @field_validator("l2", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else [value]


class Training(Section):
    """The torch loop; every key may be set again in an entry of `systems`."""

    ranks: PositiveInt = 2
    epochs: PositiveInt = 5
    batch_size: PositiveInt = Field(512, description="rows a rank and step")
    hidden: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (256, 128)
    channels: PositiveInt = Field(1, description="values a field in the locally connected layer")
    start: Start = Field(
        "lr_cross_fitted", description="where M1 begins: an LR of these or other rows"
    )
    m1: Literal["joint", "frozen"] = Field(
        "frozen",
        description="after lr_cross_fitted or lr_past: M1 is trained with the rest, or kept as it "
        "is and in the end set to the LR of all rows",
    )
    joint_epochs: Annotated[int, Field(ge=0)] = Field(
        0, description="after m1: frozen, last epochs in which M1 is that LR, trained jointly"
    )
    days: PositiveInt | None = Field(
        None, description="lr_past needs it: the last train days, on which the network is trained"
    )
    batch_norm: bool = True
    dropout: Fraction = 0.0
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="of the MLP (AdamW)")
    m1_learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    m1_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    evaluations: PositiveInt = Field(2, description="looks at the valid split an epoch")
    patience: PositiveInt = Field(2, description="epochs without a better validation AUC")
    precision: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"


class System(Section):
    """One line of the result table; `training` holds what differs from the common settings."""

    system: SystemKind
    name: Name = ""
    training: dict[str, Any] = Field({}, description="keys of the section `training`")

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

    @model_validator(mode="after")
    def _leaves_what_is_fixed(self) -> Self:
        for key in FIXED.get(self.system, {}):
            if key in self.training:
                raise ValueError(
                    f"{self.system} has no '{key}' to choose: that is for {', '.join(LC_SYSTEMS)}"
                )
        return self


class Variant(Section):
    """A start of M1 that an experiment compares."""

    name: Name
    training: dict[str, Any] = Field({}, description="keys of the section `training`")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: Any) -> Any:
        return {"name": data, "training": {"start": data}} if isinstance(data, str) else data

    @field_validator("training")
    @classmethod
    def _known_settings(cls, value: dict[str, Any]) -> dict[str, Any]:
        Training.model_validate(value)
        return value


class Experiment(Section):
    """What `lc-spark experiment` runs: systems x starts x seeds."""

    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (1, 2, 3)
    starts: tuple[Variant, ...] = Field(
        (), description="for every LC system that names no start of its own"
    )
    systems: tuple[System, ...] = Field((), description="default: the config's systems")

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("names a seed twice: the second run would repeat the first")
        return value
