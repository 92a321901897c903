"""FieldMap: what was learnt about the fields, as JSON, with a fingerprint.

The only thing that the Spark side and the torch side share. A global index is
``field.offset + index``; d is the number of features, f the number of fields.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lc_spark import files
from lc_spark.errors import LcSparkError
from lc_spark.files import AnyPath

MISSING = 0  # index of a missing value in every field
OUT_OF_VOCABULARY = 1  # index of rare and unseen values in fields with a vocabulary
PADDING = -1  # fills the fixed-length list of a multivalued field


@dataclass(frozen=True)
class FieldInfo:
    """One field as fitted.

    size counts its features (indices 0 .. size - 1). A continuous field has two: the weight of
    "missing" and the weight that multiplies the standardised value.
    """

    name: str
    kind: str
    size: int
    offset: int = 0
    column: str = ""  # raw column; empty for a cross
    column_type: str = ""  # Spark's simpleString of the raw column
    cut_points: tuple[float, ...] = ()
    mean: float = 0.0
    sd: float = 1.0
    low: float = 0.0  # fitted range of a continuous field
    high: float = 0.0
    of: tuple[str, ...] = ()
    hashed: int | None = None
    delimiter: str | None = None
    max_values: int = 1
    vocabulary_digest: str = ""

    @property
    def has_vocabulary(self) -> bool:
        """Whether indices come from a learnt vocabulary."""
        return self.kind in ("categorical", "multivalued", "crossed") and self.hashed is None


@dataclass(frozen=True)
class FieldMap:
    """The fields in order, and the fingerprint over all of it."""

    fields: tuple[FieldInfo, ...]
    fingerprint: str = field(default="", compare=False)
    parent: str = field(default="", compare=False)  # fingerprint of the map that this one grew from

    def __post_init__(self) -> None:
        offset, placed = 0, []
        for info in self.fields:
            placed.append(dataclasses.replace(info, offset=offset))
            offset += info.size
        object.__setattr__(self, "fields", tuple(placed))
        text = json.dumps([dataclasses.asdict(info) for info in placed], sort_keys=True)
        computed = hashlib.sha256(text.encode()).hexdigest()[:16]
        if self.fingerprint not in ("", computed):
            raise LcSparkError(
                f"The field map says fingerprint {self.fingerprint}, its content has {computed}: "
                "the file was changed by hand. Run the features stage again."
            )
        object.__setattr__(self, "fingerprint", computed)

    @property
    def d(self) -> int:
        """Number of features."""
        return sum(info.size for info in self.fields)

    @property
    def raw_columns(self) -> dict[str, str]:
        """Raw column -> Spark type, for every column that a field reads."""
        return {info.column: info.column_type for info in self.fields if info.column}

    def __getitem__(self, name: str) -> FieldInfo:
        for info in self.fields:
            if info.name == name:
                return info
        raise KeyError(name)

    def places_in(self, grown: "FieldMap") -> NDArray[np.int64]:
        """Return for each of the d global indices here the one that it has in a map grown from it.

        Raises LcSparkError when the other map did not grow from this one.
        """
        if grown.parent != self.fingerprint:
            raise LcSparkError(
                f"The field map {grown.fingerprint} did not grow from {self.fingerprint}, whose "
                "weights it is to take over: run 'features' again, or set refresh.mode to scratch."
            )
        blocks = [grown[info.name].offset + np.arange(info.size) for info in self.fields]
        return np.concatenate(blocks)

    def to_json(self) -> str:
        """Return the map as JSON text."""
        content = {
            "fingerprint": self.fingerprint,
            "parent": self.parent,
            "d": self.d,
            "fields": [dataclasses.asdict(info) for info in self.fields],
        }
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what to_json wrote; refuses a map whose content does not fit its fingerprint."""
        content = json.loads(text)
        infos = tuple(_info(entry) for entry in content["fields"])
        return cls(infos, content["fingerprint"], content.get("parent", ""))

    def write(self, path: AnyPath) -> None:
        """Write the map to a file."""
        files.write_text(path, self.to_json())

    @classmethod
    def read(cls, path: AnyPath) -> Self:
        """Read the map from a file."""
        if not path.is_file():
            raise LcSparkError(f"There is no field map at {path}: run the features stage first.")
        return cls.from_json(path.read_text(encoding="utf-8"))


def _info(entry: dict[str, Any]) -> FieldInfo:
    lists = {key: tuple(value) for key, value in entry.items() if isinstance(value, list)}
    return FieldInfo(**{**entry, **lists})


def require_same(fingerprint: str, other: str, what: str) -> None:
    """Refuse to go on when two parts were made with different field maps."""
    if fingerprint != other:
        raise LcSparkError(
            f"{what} carries the fingerprint {other}, but the field map here has {fingerprint}: "
            "they were made from different fields or vocabularies. Run the stages again from "
            "'features' on."
        )
