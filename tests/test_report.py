"""The report says every number, escapes what it shows, and loads nothing from elsewhere."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.lines import Line2D
from rich.console import Console

from lc_spark import figures
from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.report import ReportContent, number, result_table, winner, write_report


def make_config(workspace: Path) -> Config:
    return Config.model_validate(
        {
            "name": "toy",
            "workspace": str(workspace),
            "source": {"path": "rows.parquet"},
            "label": "y",
            "split": {"by": "hash"},
            "fields": [{"name": "a", "kind": "categorical"}],
            "systems": ["lr", "lc_dnn"],
        }
    )


def make_result(system: str, auc: float, logloss: float, **changes: Any) -> dict[str, Any]:
    result = {
        "system": system,
        "auc": auc,
        "logloss": logloss,
        "ne": logloss / 0.55,
        "calibration": 1.0123,
        "group_auc": None,
        "parameters": 1_234_567,
        "seconds_per_epoch": 7.25,
        "train_rows": 229_123,
        "test_rows": 65_432,
        "run_id": f"run_of_{system}",
    }
    return {**result, **changes}


RESULTS = [
    make_result("lr", 0.7451, 0.49731, seconds_per_epoch=None, parameters=6_012),
    make_result("lc_dnn", 0.7612, 0.48614),
    make_result("lc_wd", 0.7623, 0.48702),
]


def make_content(**changes: Any) -> ReportContent:
    fpr = np.linspace(0, 1, 50)
    names = [row["system"] for row in RESULTS]
    rates = np.linspace(0.02, 0.6, 10)
    content: dict[str, Any] = {
        "results": RESULTS,
        "rows": [("source", 336_776), ("raw", 327_346), ("rejected", 9_430), ("train", 229_123)],
        "rejected": [("cancelled", 8_255), ("diverted", 1_175)],
        "split": "Rows are split by a seeded hash of the row id: 70 / 10 / 20 %.",
        "fingerprint": "2663f72282965076",
        "mlflow_command": "lc-spark ui conf/flights.yaml",
        "roc": {n: (fpr, fpr ** (0.35 - 0.03 * i), 0.745) for i, n in enumerate(names)},
        "calibration": {n: (rates, rates * (1 + 0.06 * i)) for i, n in enumerate(names)},
        "histories": {
            "lc_dnn": {
                "epoch": [1, 2, 3],
                "train": [0.51, 0.49, 0.485],
                "valid": [0.5, 0.49, 0.487],
            },
            "lc_wd": {
                "epoch": [1, 2, 3],
                "train": [0.52, 0.488, 0.481],
                "valid": [0.5, 0.491, 0.489],
            },
        },
        "lr_loss": [0.69, 0.55, 0.52, 0.505, 0.5, 0.499],
        "top_fields": [
            {"field": "hour", "kind": "bucketed", "features": 26, "importance": 0.731},
            {"field": "carrier_x_origin", "kind": "crossed", "features": 38, "importance": 0.402},
        ],
        "top_values": [{"field": "dest", "value": "TUL", "count": 294, "weight": 0.913}],
    }
    return ReportContent(**{**content, **changes})


def page_of(tmp_path: Path, **changes: Any) -> str:
    path = write_report(make_config(tmp_path), make_content(**changes))
    return path.read_text(encoding="utf-8")


def test_the_page_shows_every_system_with_its_numbers(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.DOTALL)
    for result, parameters in zip(RESULTS, ("6,012", "1,234,567", "1,234,567"), strict=True):
        row = next(text for text in rows if f">{result['system']}<" in text)
        cells = re.findall(r'<td class="n">(.*?)</td>', row)
        seconds = "–" if result["system"] == "lr" else "7.2"
        numbers = [f"{result[k]:.{d}f}" for k, d in (("auc", 4), ("logloss", 5), ("ne", 4))]
        assert cells == [*numbers, "1.0123", parameters, seconds]
    for text in ("336,776", "cancelled", "8,255", "by a seeded hash", "2663f72282965076", "0.731"):
        assert text in page


def test_the_winner_is_named_in_words(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert winner(RESULTS) == "lc_dnn"
    marked = r'<th scope="row">(\w+)<span class="mark">lowest log loss</span>'
    assert re.findall(marked, page) == ["lc_dnn"]


def test_no_result_with_a_log_loss_is_said() -> None:
    with pytest.raises(LcSparkError, match="No system has a log loss"):
        winner([make_result("lr", 0.7, float("nan"))])


def test_values_from_the_data_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    page = page_of(
        tmp_path,
        results=[make_result(evil, 0.7, 0.5)],
        rejected=[(evil, 1)],
        top_values=[{"field": evil, "value": evil, "count": 1, "weight": -0.5}],
        roc={evil: ([0, 1], [0, 1], 0.5)},
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    for address in re.findall(r"""(?:src|href|resource)\s*=\s*["']([^"']*)""", page):
        assert address.startswith("#")
    assert "@import" not in page
    assert "<script" not in page
    assert "<link" not in page
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", page))


def test_results_json_round_trips_and_has_null_for_what_is_not_defined(tmp_path: Path) -> None:
    write_report(make_config(tmp_path), make_content())
    path = tmp_path / "report" / "results.json"
    numbers = json.loads(path.read_text())
    assert numbers["results"] == RESULTS
    assert numbers["best_reachable"] is None
    one_class = make_result("lr", float("nan"), 0.5)
    write_report(make_config(tmp_path), make_content(results=[one_class]))
    assert json.loads(path.read_text())["results"] == [{**one_class, "auc": None}]


def test_group_auc_is_a_column_only_where_it_was_asked_for(tmp_path: Path) -> None:
    assert "group AUC" not in page_of(tmp_path)
    grouped = [make_result("lr", 0.7, 0.5, group_auc=0.6789)]
    page = page_of(tmp_path, results=grouped)
    assert "group AUC" in page
    assert "0.6789" in page


def test_a_report_without_curves_has_no_figures(tmp_path: Path) -> None:
    assert page_of(tmp_path).count("<svg") == 4
    without: dict[str, Any] = {"roc": {}, "calibration": {}, "histories": {}, "lr_loss": ()}
    assert "<svg" not in page_of(tmp_path, **without)


def test_the_same_content_gives_the_same_page(tmp_path: Path) -> None:
    assert page_of(tmp_path / "a") == page_of(tmp_path / "b")


@pytest.mark.parametrize(
    ("value", "form", "expected"),
    [
        (0.76124, ".4f", "0.7612"),
        (1234567, ",d", "1,234,567"),
        (1234567.0, ",d", "1,234,567"),
        (-0.5, "+.3f", "-0.500"),
        (None, ".4f", "–"),
        (float("nan"), ",d", "–"),
    ],
)
def test_number(value: float | None, form: str, expected: str) -> None:
    assert number(value, form) == expected


def test_the_terminal_table_has_one_line_a_system() -> None:
    output = io.StringIO()
    Console(width=80, file=output).print(result_table(RESULTS))
    line = next(line for line in output.getvalue().splitlines() if "lc_dnn" in line)
    assert line.split() == [
        "lc_dnn",
        "*",
        "0.7612",
        "0.48614",
        "0.8839",
        "1.0123",
        "1,234,567",
        "7.2",
    ]
    assert "calibration parameters" in " ".join(output.getvalue().split())


def points_of(line: Line2D) -> Any:
    return np.asarray(line.get_xydata()).tolist()


def test_figures_draw_the_points_they_are_given() -> None:
    roc = figures.roc({"lr": ([0, 0.2, 1], [0, 0.7, 1], 0.75)}).axes[0]
    chance, curve = roc.get_lines()
    assert points_of(curve) == [[0, 0], [0.2, 0.7], [1, 1]]
    assert curve.get_label() == "lr (AUC 0.7500)"
    loss = figures.loss_by_epoch(
        {"lc_dnn": {"epoch": [0.5, 1], "train": [0.5, 0.4], "valid": [0.6, 0.5]}}
    ).axes[0]
    assert [points_of(line) for line in loss.get_lines()] == [
        [[0.5, 0.5], [1, 0.4]],
        [[0.5, 0.6], [1, 0.5]],
    ]
    assert [line.get_linestyle() for line in loss.get_lines()] == ["--", "-"]
    objective = figures.lr_loss([0.69, 0.5]).axes[0].get_lines()[0]
    assert points_of(objective) == [[0, 0.69], [1, 0.5]]
    for axes in (roc, loss):
        assert axes.get_xlabel()
        assert axes.get_ylabel()
    assert chance.get_label() == "chance"


def test_systems_differ_without_colour() -> None:
    points = {f"system_{i}": ([0.1, 0.2], [0.1, 0.2]) for i in range(4)}
    lines = figures.calibration(points).axes[0].get_lines()[1:]
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == 4


def test_svg_keeps_text_as_text() -> None:
    svg = figures.as_svg(figures.lr_loss([0.69, 0.5]))
    assert svg.startswith("<svg")
    assert "LR: objective by pass over the data</text>" in svg
