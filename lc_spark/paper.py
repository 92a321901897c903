"""Turns a field map, shards and systems into the paper's tables, its own numbers beside them.

Source: Chen et al., WWW 2017 Companion, doi 10.1145/3041021.3054227, its Tables 1, 3 and 4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lc_spark.field_map import FieldMap
from lc_spark.parameters import parameter_count
from lc_spark.systems import SystemKind, Training

Row = dict[str, Any]

APP_DATA: Row = {
    "data": "the paper's AppData",
    "train_rows": 9_000_000,
    "test_rows": 2_035_501,
    "raw_fields": 158,
    "features": 8_672_633,
    "categorical": 8_672_607,
}
FEEDS_DATA: Row = {
    "data": "the paper's FeedsData",
    "train_rows": 86_980_291,
    "test_rows": 23_249_245,
    "raw_fields": 2_311,
    "features": 8_522_742,
    "categorical": 8_521_329,
}
PAPER_HIDDEN = (2048, 1024)
# AUC on AppData and FeedsData.
PAPER_AUC: Mapping[str, tuple[float, float]] = {
    "lr": (0.9131, 0.7835),
    "dnn": (0.8633, 0.7847),
    "lc_dnn": (0.9205, 0.7905),
    "lc_wd": (0.9201, 0.7918),
}


@dataclass(frozen=True)
class Table:
    """A table of the report: columns are key -> (heading, number format; "" for text)."""

    key: str
    title: str
    note: str
    columns: dict[str, tuple[str, str]]
    rows: list[Row]


def table_1(name: str, field_map: FieldMap, manifest: Mapping[str, Any]) -> Table:
    """Return the data in numbers: rows, fields, features, and how many of them are one-hot."""
    values = sum(info.kind == "continuous" for info in field_map.fields)
    ours = {
        "data": name,
        "train_rows": manifest["splits"]["train"]["rows"],
        "test_rows": manifest["splits"]["test"]["rows"],
        "raw_fields": len(field_map.fields),
        "features": field_map.d,
        "categorical": field_map.d - values,
    }
    rows = [ours, APP_DATA, FEEDS_DATA]
    return Table(
        "table_1",
        "The data (the paper's Table 1)",
        "Fields include crosses; sparsity is categorical features over all of them.",
        {
            "data": ("data", ""),
            "train_rows": ("train rows", ",d"),
            "test_rows": ("test rows", ",d"),
            "raw_fields": ("fields", ",d"),
            "features": ("features d", ",d"),
            "categorical": ("categorical", ",d"),
            "sparsity": ("sparsity", ".4%"),
        },
        [{**row, "sparsity": row["categorical"] / row["features"]} for row in rows],
    )


# System -> its formula, for k channels and two hidden layers (the paper's Table 2).
FORMULAS: Mapping[SystemKind, str] = {
    "lr": "d",
    "lr_equivalent": "d",
    "dnn": "d K1 + K1 K2 + K2",
    "lc_dnn": "d k + f k K1 + K1 K2 + K2",
    "lc_wd": "d k + f k K1 + K1 K2 + K2 + d",
    "lc_resnet": "d k + f k K1 + 2 K1 (K1 + K2) + K1",
    "wide_deep": "d k + f k K1 + K1 K2 + K2 + d",
}


def table_3(field_map: FieldMap, systems: Sequence[tuple[str, SystemKind, Training]]) -> Table:
    """Return parameters by formula and counted, for these data and for the paper's.

    systems are (name, system, training).
    """
    d, f = field_map.d, len(field_map.fields)
    rows = []
    for name, kind, training in systems:
        k = training.channels
        count = parameter_count(kind, d, f, training.hidden, k, training.batch_norm)
        row: Row = {
            "system": name,
            "formula": FORMULAS[kind],
            "channels": k,
            "weights": count.weights,
            "counted": count.total,
        }
        for key, data in (("app", APP_DATA), ("feeds", FEEDS_DATA)):
            sizes = data["features"], data["raw_fields"]
            row[key] = float(parameter_count(kind, *sizes, PAPER_HIDDEN, k).weights)
        rows.append(row)
    return Table(
        "table_3",
        "Parameters (the paper's Tables 2 and 3)",
        f"d = {d:,}, f = {f}. By formula: weights alone. Counted: all tensors, biases and "
        "BatchNorm too. The last two columns are the formula at the paper's d and f with K1, K2 = "
        "2048, 1024; the paper prints 8.67E6, 1.78E10, 1.11E7, 1.98E7 and 8.52E6, 1.75E10, "
        "1.54E7, 2.39E7 for LR, DNN, LC-DNN and LC-W&D.",
        {
            "system": ("system", ""),
            "formula": ("formula", ""),
            "channels": ("k", ",d"),
            "weights": ("by formula", ",d"),
            "counted": ("counted", ",d"),
            "app": ("AppData", ".2E"),
            "feeds": ("FeedsData", ".2E"),
        },
        rows,
    )
