"""How time and memory of the whole pipeline grow with rows, or with fields.

    python tests/benchmarks/growth.py rows 1000000 2000000 --and workspace/appdata
    python tests/benchmarks/growth.py fields 40 158 632 --rows 200000

rows: logs of AppData's shape, on which d grows with the rows; each goes through `lc-spark run
conf/appdata.yaml`. --and takes a run of that config that was made before as one more size. fields:
a log of FeedsData's shape with so many of its columns, as large a part of them continuous as
AppData has. Making the logs is not counted. The table has the seconds of each stage and the peak
memory of all processes together; an exponent is the slope in logarithms (1 grows in proportion, 0
not at all), and of two sizes a small one says little: every stage has a start that costs the same.
The figure goes beside this file.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from matplotlib.figure import Figure

from lc_spark.paper_logs import SHAPES

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
STAGES = ("ingest", "features", "train_lr", "train_lc", "evaluate", "gate")
CLI = "from lc_spark.cli import main; main()"
Size = dict[str, Any]  # a line of the table


def lc_spark(*arguments: str) -> None:
    """Run a command of lc-spark, whose output goes to the terminal's error stream."""
    subprocess.run([sys.executable, "-c", CLI, *arguments], stdout=sys.stderr, check=True, cwd=ROOT)


def measured(config: dict[str, Any], folder: Path, overrides: Sequence[str]) -> Size:
    """Run the pipeline in a workspace that is removed again; return what its stages took."""
    path, workspace = folder / "config.yaml", folder / "workspace"
    path.write_text(yaml.safe_dump({**config, "workspace": str(workspace)}, sort_keys=False))
    lc_spark("run", str(path), *(word for override in overrides for word in ("--set", override)))
    line = of_run(workspace)
    shutil.rmtree(workspace)
    return line


def of_run(workspace: Path) -> Size:
    """Return what the stages of a run took."""
    facts = {s: json.loads((workspace / "stages" / f"{s}.json").read_text()) for s in STAGES}
    line = {"rows": facts["features"]["raw_rows"], "d": facts["features"]["features"]}
    line |= {stage: facts[stage]["seconds"] for stage in STAGES}
    line["together"] = sum(facts[stage]["seconds"] for stage in STAGES)
    line["peak GB"] = max(facts[stage]["peak_bytes"] for stage in STAGES) / 1e9
    return line


def by_rows(sizes: list[int], folder: Path, overrides: Sequence[str]) -> list[Size]:
    """Measure logs of AppData's shape with so many rows."""
    config = yaml.safe_load((ROOT / "conf" / "appdata.yaml").read_text())
    config["source"]["path"] = str(folder / "log")
    lines = []
    for rows in sizes:
        lc_spark("synth", "appdata", str(folder / "log"), "--rows", str(rows), "--seed", "1")
        lines.append(measured(config, folder, overrides))
    return lines


def by_fields(sizes: list[int], rows: int, folder: Path, overrides: Sequence[str]) -> list[Size]:
    """Measure one log of FeedsData's shape with so many of its fields."""
    config = yaml.safe_load((ROOT / "conf" / "feedsdata.yaml").read_text())
    config["source"]["path"] = str(folder / "part")
    shape = SHAPES["appdata"]
    lc_spark("synth", "feedsdata", str(folder / "log"), "--rows", str(rows), "--seed", "1")
    lines = []
    for n in sizes:
        n_continuous = round(n * shape.continuous / (shape.categorical + shape.continuous))
        by_kind = {"categorical": n - n_continuous, "continuous": n_continuous}
        fields = []
        for kind, wanted in by_kind.items():
            all_fields = [f for f in config["fields"] if f["kind"] == kind]
            # Evenly: the sizes of the vocabularies ascend.
            fields += [all_fields[i * len(all_fields) // wanted] for i in range(wanted)]
        shutil.rmtree(folder / "part", ignore_errors=True)
        (folder / "part").mkdir()
        columns = [
            "impression",
            "date",
            "clicked",
            "true_probability",
            *(f["name"] for f in fields),
        ]
        for path in (folder / "log").glob("*.parquet"):
            pq.write_table(pq.read_table(path, columns=columns), folder / "part" / path.name)
        lines.append({"fields": n, **measured({**config, "fields": fields}, folder, overrides)})
    return lines


def exponents(lines: list[Size]) -> Size:
    """Return the slope of each column against the first one, in logarithms."""
    first = next(iter(lines[0]))
    x = np.log([line[first] for line in lines])
    slopes = {
        key: float(np.polyfit(x, np.log([max(line[key], 1e-9) for line in lines]), 1)[0])
        for key in lines[0]
        if key != first
    }
    return {first: "exponent", **slopes}


def print_table(lines: list[Size]) -> None:
    """Print the lines and the exponents."""
    keys = list(lines[0])
    print("| " + " | ".join(keys) + " |\n|" + "---|" * len(keys))
    for line in lines:
        cells = [f"{v:,}" if isinstance(v, int) else f"{v:,.1f}" for v in line.values()]
        print("| " + " | ".join(cells) + " |")
    if len(lines) > 1:
        slopes = exponents(lines)
        cells = [v if isinstance(v, str) else f"{v:.2f}" for v in slopes.values()]
        print("| " + " | ".join(cells) + " |")


def draw(lines: list[Size], path: Path) -> None:
    """Draw seconds by stage, and peak memory, against the first column."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    times, memory = figure.subplots(1, 2)
    first = next(iter(lines[0]))
    x = [line[first] for line in lines]
    for marker, stage in zip("osD^vPX", (*STAGES, "together"), strict=True):
        times.plot(x, [line[stage] for line in lines], marker=marker, label=stage)
    memory.plot(x, [line["peak GB"] for line in lines], marker="o")
    for axes, label in ((times, "seconds"), (memory, "peak memory, GB")):
        axes.set(xscale="log", xlabel=first, ylabel=label)
        axes.set_xticks(x, [f"{n:,}" for n in x])
        axes.minorticks_off()
        axes.grid(color="#d5d5d5", linewidth=0.6)
    times.set_yscale("log")
    memory.set_ylim(bottom=0)
    times.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)


def main() -> None:
    """Parse, measure size after size, print a table, draw a figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["rows", "fields"])
    parser.add_argument("sizes", type=int, nargs="+")
    parser.add_argument("--rows", type=int, default=200_000, help="of the log, with fields")
    parser.add_argument("--and", type=Path, dest="made", metavar="WORKSPACE", help="with rows")
    parser.add_argument("--set", action="append", default=[], help="of the config: KEY=VALUE")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lc_spark_growth_"))
    if arguments.what == "rows":
        lines = by_rows(arguments.sizes, folder, arguments.set)
        lines += [of_run(arguments.made)] if arguments.made else []
    else:
        lines = by_fields(arguments.sizes, arguments.rows, folder, arguments.set)
    shutil.rmtree(folder)
    print_table(lines)
    draw(lines, HERE / f"growth_{arguments.what}.svg")


if __name__ == "__main__":
    main()
