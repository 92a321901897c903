"""The kinds of field that a config can name, as settings; FieldInfo is what is learnt of them."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
PositiveInt = Annotated[int, Field(gt=0)]
Slots = Annotated[int, Field(gt=0, lt=2**31 - 1)]  # an index has 32 bits
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the config; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
    hashed: Slots | None = Field(None, description="fixed number of indices, no vocabulary")


class Multivalued(ColumnField):
    """A set of values a row: an array column, or a string with a delimiter."""

    kind: Literal["multivalued"]
    delimiter: str | None = Field(None, min_length=1)
    max_values: PositiveInt = Field(16, description="values kept a row, the most frequent first")
    min_count: PositiveInt = 2
    hashed: Slots | None = Field(None, description="fixed number of indices, no vocabulary")


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
    hashed: Slots | None = Field(None, description="fixed number of indices, no vocabulary")

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
