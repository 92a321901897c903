"""Turns curves and histories into matplotlib figures, for MLflow and the report."""

import io
import statistics
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, which stay apart for colour-blind readers; the line styles and markers
# say the same without any colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SIZE = (5.2, 4.0)  # inches

Numbers = Sequence[float]
Style = dict[str, str]


def _style(place: int) -> Style:
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": LINES[place % len(LINES)],
        "marker": MARKERS[place % len(MARKERS)],
    }


def _axes(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color="#d5d5d5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def roc(curves: Mapping[str, tuple[Numbers, Numbers, float]]) -> Figure:
    """Draw ROC curves: system -> (false positive rates, true positive rates, AUC)."""
    figure, axes = _axes("ROC", "false positive rate", "true positive rate")
    axes.plot([0, 1], [0, 1], color="#888888", linewidth=0.8, label="chance")
    for place, (name, (fpr, tpr, auc)) in enumerate(curves.items()):
        style = _style(place) | {"marker": ""}
        axes.plot(fpr, tpr, label=f"{name} (AUC {auc:.4f})", linewidth=1.6, **style)  # type: ignore[arg-type]
    axes.set_aspect("equal")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    return figure


def calibration(points: Mapping[str, tuple[Numbers, Numbers]]) -> Figure:
    """Draw predicted against observed rates: system -> (mean score, observed rate) by decile."""
    title, x_label = "Calibration by decile of the score", "mean predicted rate"
    figure, axes = _axes(title, x_label, "observed rate")
    highest = max((max(*p, *o) for p, o in points.values() if len(p)), default=1.0)
    limit = min(1.0, 1.05 * highest) or 1.0
    axes.plot([0, limit], [0, limit], color="#888888", linewidth=0.8, label="perfect")
    for place, (name, (predicted, observed)) in enumerate(points.items()):
        style = _style(place)
        axes.plot(predicted, observed, label=name, linewidth=1.2, markersize=5, **style)  # type: ignore[arg-type]
    axes.set_aspect("equal")
    axes.set(xlim=(0, limit), ylim=(0, limit))
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    return figure


def loss_by_epoch(histories: Mapping[str, Mapping[str, Numbers]]) -> Figure:
    """Draw log losses by epoch: system -> {"epoch": numbers, "train": likewise, "valid": ...}.

    A system has one colour and marker; train is drawn dashed, everything else solid.
    """
    figure, axes = _axes("Log loss by epoch", "epoch", "log loss")
    for place, (name, lines) in enumerate(histories.items()):
        for split, losses in lines.items():
            if split == "epoch":
                continue
            style = _style(place) | {"linestyle": "--" if split == "train" else "-"}
            epochs = lines["epoch"]
            label = f"{name}, {split}"
            axes.plot(epochs, losses, label=label, linewidth=1.4, markersize=5, **style)  # type: ignore[arg-type]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if histories:
        axes.legend(loc="best", frameon=False, fontsize=9)
    return figure


def lr_loss(history: Numbers) -> Figure:
    """Draw LR's objective (mean log loss and penalty) by pass, the start as pass 0."""
    figure, axes = _axes("LR: objective by pass over the data", "pass", "objective")
    axes.plot(range(len(history)), history, color=COLOURS[0], linewidth=1.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def ablation(curves: Mapping[str, Mapping[str, list[float]]], lr_test_loss: float) -> Figure:
    """Draw train log loss, test log loss and test AUC by epoch, side by side, a line a start.

    curves: start -> epoch, train_loss, test_logloss, test_auc. LR's test log loss is a level line;
    what is far from the others leaves the panel, so that the others can be told apart.
    """
    figure = Figure(figsize=(SIZE[0] * 2.4, SIZE[1]), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    shown = {
        "train_loss": "log loss on the train rows, as trained",
        "test_logloss": "log loss on the test rows",
        "test_auc": "AUC on the test rows",
    }
    for axes, (key, title) in zip(panels, shown.items(), strict=True):
        axes.set_title(title, fontsize=11, loc="left", fontweight="bold")
        axes.set_xlabel("epoch")
        axes.grid(color="#d5d5d5", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        for place, (start, lines) in enumerate(curves.items()):
            style = _style(place)
            axes.plot(lines["epoch"], lines[key], label=start, linewidth=1.4, **style)
        if key == "test_logloss":
            axes.axhline(lr_test_loss, color="#888888", linewidth=0.8, label="LR, test")
    for axes, key in zip(panels, shown, strict=True):
        axes.set_ylim(*_without_outliers([lines[key] for lines in curves.values()]))
    panels[1].legend(loc="best", frameon=False, fontsize=8)
    return figure


def _without_outliers(lines: Sequence[Numbers]) -> tuple[float, float]:
    """Return limits that hold every line whose end is within 5 % of the middle one's."""
    middle = statistics.median(line[-1] for line in lines)
    near = [value for line in lines if abs(line[-1] / middle - 1) < 0.05 for value in line]
    margin = 0.05 * (max(near) - min(near)) + 1e-6
    return min(near) - margin, max(near) + margin


def seconds_per_epoch(speeds: Mapping[str, tuple[float, float]]) -> Figure:
    """Draw a bar a system: name -> (seconds per epoch, train rows a second)."""
    figure, axes = _axes("Seconds per epoch", "", "seconds")
    seconds = [pair[0] for pair in speeds.values()]
    bars = axes.bar(list(speeds), seconds, color=COLOURS[0], width=0.6)
    axes.bar_label(bars, [f"{rows:,.0f}\nrows/s" for _, rows in speeds.values()], fontsize=8)
    axes.tick_params(axis="x", rotation=30)
    axes.margins(y=0.18)
    return figure


def field_drift(indices: Mapping[str, float], threshold: float) -> Figure:
    """Draw the population stability index of fields as bars, those given first on top."""
    figure, axes = _axes("Drift against the train rows", "population stability index", "")
    figure.set_size_inches(SIZE[0] * 1.8, 1.2 + 0.2 * len(indices))
    colours = [COLOURS[1] if index > threshold else COLOURS[0] for index in indices.values()]
    axes.barh(list(indices), list(indices.values()), color=colours, height=0.7)
    axes.axvline(threshold, color="#888888", linewidth=0.8, linestyle="--")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    return figure


def auc_by_day(
    curves: Mapping[str, tuple[Sequence[str], Numbers]], seconds: Mapping[str, Numbers]
) -> Figure:
    """Draw AUC by day, a line a way to refresh, beside the median seconds that a day's run took.

    curves: name -> (days, AUC); seconds: name -> seconds of each day.
    """
    figure = Figure(figsize=(SIZE[0] * 2.2, SIZE[1]), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    for place, (name, (days, aucs)) in enumerate(curves.items()):
        left.plot(days, aucs, label=name, linewidth=1.4, markersize=4, **_style(place))
    left.set_title("AUC of the next day", fontsize=11, loc="left", fontweight="bold")
    left.xaxis.set_major_locator(MaxNLocator(8))
    left.tick_params(axis="x", rotation=30)
    left.legend(loc="best", frameon=False, fontsize=9)
    colours = [COLOURS[place] for place in range(len(seconds))]
    medians = [statistics.median(of_days) for of_days in seconds.values()]
    bars = right.bar(list(seconds), medians, color=colours, width=0.6)
    right.bar_label(bars, [f"{median:.1f}" for median in medians], fontsize=9)
    right.set_title("seconds a day, median", fontsize=11, loc="left", fontweight="bold")
    for axes in (left, right):
        axes.grid(axis="y", color="#d5d5d5", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def as_svg(figure: Figure) -> str:
    """Return a figure as an <svg> element to put into HTML, its text kept as text.

    The same figure gives the same text whenever it is drawn. There is no background of its own.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lc_spark"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
