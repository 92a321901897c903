"""Turns results, row counts and curves into one HTML page, results.json and a terminal table."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jinja2
import rich.table
from markupsafe import Markup
from matplotlib.figure import Figure
from rich import box
from rich.text import Text

from lc_spark import figures, files
from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.files import AnyPath
from lc_spark.paper import Table

if TYPE_CHECKING:
    from lc_spark.registry import Version

Numbers = Sequence[float]

BEST = "(true probability)"  # the line of the best that any system could reach

# Key of a result -> heading, how its number is written.
COLUMNS = {
    "auc": ("AUC", ".4f"),
    "logloss": ("log loss", ".5f"),
    "ne": ("normalised entropy", ".4f"),
    "calibration": ("calibration", ".4f"),
    "group_auc": ("group AUC", ".4f"),
    "parameters": ("parameters", ",d"),
    "seconds_per_epoch": ("seconds per epoch", ".1f"),
}

# What each metric means, in one line.
METRICS = {
    "AUC": "the chance that a positive row scores above a negative one; .5 is guessing, 1 is "
    "perfect. Higher is better.",
    "log loss": "the mean of -log(score given to what happened). Lower is better.",
    "normalised entropy": "log loss divided by that of always predicting the average rate "
    "(He et al., 2014); 1 is no better than the average. Lower is better.",
    "calibration": "sum of scores divided by the number of positives. 1 is right; above 1 the "
    "scores are too high.",
    "group AUC": "AUC within each group, averaged by rows; what a ranking inside the group feels.",
}


@dataclass(frozen=True)
class ReportContent:
    """All that the report shows.

    results: one dict a system, with system, auc, logloss, ne, calibration, group_auc (or None),
    parameters, seconds_per_epoch (or None), train_rows, test_rows, run_id. top_fields: dicts of
    field, kind, features, importance (the standard deviation over the train rows of what the field
    adds to LR's logit). top_values: dicts of field, value, count, weight. best has the metrics of
    the true probabilities, where they are known. data is more for results.json. The curves are what
    ``figures`` takes.
    """

    results: list[dict[str, Any]]
    rows: list[tuple[str, int]]
    rejected: list[tuple[str, int]]
    split: str
    fingerprint: str
    mlflow_command: str
    roc: Mapping[str, tuple[Numbers, Numbers, float]] = field(default_factory=dict)
    calibration: Mapping[str, tuple[Numbers, Numbers]] = field(default_factory=dict)
    histories: Mapping[str, Mapping[str, Numbers]] = field(default_factory=dict)
    lr_loss: Numbers = ()
    top_fields: list[dict[str, Any]] = field(default_factory=list)
    top_values: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    tables: list[Table] = field(default_factory=list)
    claims: list[str] = field(default_factory=list)
    further_figures: list[tuple[str, Figure]] = field(default_factory=list)
    wide_figures: tuple[str, ...] = ()  # those that take the width of the page
    data: dict[str, Any] = field(default_factory=dict)


def winner(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the system with the lowest log loss; the earlier one of equals.

    Raises LcSparkError when there is no result with a log loss.
    """
    known = [result for result in results if not _absent(result["logloss"])]
    if not known:
        raise LcSparkError("No system has a log loss: run the stages 'train' and 'evaluate' first.")
    return str(min(known, key=lambda result: result["logloss"])["system"])


def versions_table(name: str, versions: Sequence["Version"]) -> rich.table.Table:
    """Return the versions of a registered model as a table for the terminal."""
    table = rich.table.Table(title=f"{name}: {len(versions)} versions", box=box.SIMPLE_HEAD)
    for heading in ("version", "alias", "day", "system", "gate", "promoted", "why"):
        table.add_column(heading)
    for each in versions:
        tags = each.tags
        back = tags.get("rolled_back_at")
        promoted = f"{tags.get('promoted_at', '')} {tags.get('promoted_by', '')}".strip()
        why = f"rolled back: {tags['rolled_back_why']}" if back else tags.get("promoted_why")
        table.add_row(
            each.version,
            ", ".join(each.aliases),
            tags.get("day", ""),
            tags.get("system", ""),
            tags.get("gate", ""),
            promoted,
            Text(why or tags.get("gate_says", "")),
        )
    return table


def write_report(config: Config, content: ReportContent) -> AnyPath:
    """Write report/index.html and report/results.json in the run's folder; return the page's path.

    The page is one file that loads nothing else. A number that is not defined is null in the JSON.
    """
    folder = config.run_path / "report"
    numbers = {
        "results": content.results,
        "best_reachable": content.best,
        **{table.key: table.rows for table in content.tables},
        "claims": content.claims,
        **content.data,
    }
    text = json.dumps(_defined(numbers), indent=1, allow_nan=False)
    files.write_text(folder / "results.json", text + "\n")
    page = folder / "index.html"
    files.write_text(page, _html(config, content))
    return page


def render(template: str, **values: Any) -> str:
    """Return a page of templates/ with values in it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lc_spark"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = number
    return environment.get_template(template).render(**values)


def _html(config: Config, content: ReportContent) -> str:
    best = winner(content.results)
    columns = _columns(content.results)
    return render(
        "report.html",
        name=config.name,
        content=content,
        best=next(row for row in content.results if row["system"] == best),
        columns=columns,
        metrics={k: v for k, v in METRICS.items() if k in dict(columns.values())},
        figures=_figures(content),
        largest=max((row["importance"] for row in content.top_fields), default=0.0),
    )


def _figures(content: ReportContent) -> list[tuple[str, Markup]]:
    """Return (what it shows, SVG) of each figure that there is data for."""
    made: list[tuple[str, Figure]] = []
    if content.roc:
        made.append(("ROC curves of the systems on the test split", figures.roc(content.roc)))
    if content.calibration:
        figure = figures.calibration(content.calibration)
        made.append(("Predicted against observed rate by decile of the score", figure))
    if content.histories:
        made.append(("Log loss by epoch", figures.loss_by_epoch(content.histories)))
    if content.lr_loss:
        made.append(("Objective of LR by pass", figures.lr_loss(content.lr_loss)))
    made = [*content.further_figures, *made]
    return [(what, inline(figure)) for what, figure in made]


def inline(figure: Figure) -> Markup:
    """Return a figure as SVG: the one text that is not escaped, since matplotlib has done so."""
    return Markup(figures.as_svg(figure))


def _columns(results: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Return the columns to show: all of them, but for group AUC where no system has one."""
    grouped = any(not _absent(result.get("group_auc")) for result in results)
    return {key: value for key, value in COLUMNS.items() if key != "group_auc" or grouped}


def _defined(value: Any) -> Any:
    """Return the value with None for every number that is not defined, at any depth."""
    if isinstance(value, dict):
        return {key: _defined(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_defined(item) for item in value]
    return None if _absent(value) else value


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def number(value: float | None, form: str) -> str:
    """Write a number in a format such as ".4f"; a dash when it is not defined."""
    if value is None or _absent(value):
        return "–"
    return format(int(value) if form.endswith("d") else value, form)


def result_table(
    results: Sequence[Mapping[str, Any]], reachable: Mapping[str, Any] | None = None
) -> rich.table.Table:
    """Return the results as a table for the terminal, the winner marked by a star.

    reachable are the metrics of the true probabilities, where they are known.
    """
    best = winner(results)
    table = rich.table.Table(
        title="Results on the test split", box=box.SIMPLE_HEAD, padding=0, pad_edge=False
    )
    table.caption = "* lowest log loss"
    table.add_column("system", no_wrap=True)
    columns = _columns(results)
    for heading, _ in columns.values():
        table.add_column(heading.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for result in results:
        mark = " *" if result["system"] == best else ""
        cells = [number(result.get(key), form) for key, (_, form) in columns.items()]
        table.add_row(f"{result['system']}{mark}", *cells, style="bold" if mark else "")
    if reachable is not None:
        table.add_row(BEST, *(number(reachable.get(k), form) for k, (_, form) in columns.items()))
    return table
