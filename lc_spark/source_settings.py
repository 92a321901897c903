"""Where raw rows come from, as settings."""

from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lc_spark.field_kinds import Fraction, Name, Section


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
