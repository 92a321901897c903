"""Runs the benchmarks of scale and speed, and writes what they print to a page.

    python tests/benchmarks/bench.py [--only NAME ...] [--output tests/benchmarks/results.md]

Every benchmark is a command of its own, which the page shows above what it printed; those that
--only does not name stay on the page as they were. Run nothing beside it.
"""

import argparse
import datetime
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import psutil

HERE = Path(__file__).parent
LOG = "workspace/bench/appdata"  # a tenth of the paper's AppData
ALL = "data/appdata"
RUN = "workspace/appdata"
ALL_MADE = (ALL, f"synth appdata {ALL} --seed 1")
# Section -> what it needs, and the command of lc-spark that makes it.
NEEDED = {
    "features": [(LOG, f"synth appdata {LOG} --rows 1000000 --seed 1")],
    "indexer": [ALL_MADE],
    "growth": [
        ALL_MADE,
        (f"{RUN}/stages/gate.json", "run conf/appdata.yaml --set training.precision=bfloat16"),
    ],
}
# Name -> the commands of a section, each beginning with what the program `python` is given.
SECTIONS = {
    "features": [f"tests/benchmarks/features.py {LOG}"],
    "indexer": [
        f"tests/benchmarks/features.py {ALL} --indexer --fields 40 --rows 1000000 --times 3",
    ],
    "lr": [
        "tests/benchmarks/lr_pass.py --config conf/flights.yaml",
        "tests/benchmarks/lr_by.py --config conf/flights.yaml",
    ],
    "step": [
        "tests/benchmarks/training_step.py",
        "tests/benchmarks/training_step.py --precision bfloat16",
        "tests/benchmarks/training_step.py --profile",
    ],
    "dnn": [
        "tests/benchmarks/training_step.py --systems dnn",
        "tests/benchmarks/training_step.py --systems dnn --d 400000 --precision bfloat16",
    ],
    "ranks": ["tests/benchmarks/ranks.py"],
    "d": [
        "tests/benchmarks/large_d.py",
        "tests/benchmarks/large_d.py --d 1000000000 --steps 100",
    ],
    "growth": [
        "tests/benchmarks/growth.py rows 1000000 2000000 "
        f"--set training.precision=bfloat16 --and {RUN}",
        "tests/benchmarks/growth.py fields 40 158 632 --rows 100000 "
        "--set training.precision=bfloat16",
    ],
    "optimizer": [
        "tests/benchmarks/m1_optimizer.py conf/synthetic.yaml --channels 1",
        "tests/benchmarks/m1_optimizer.py conf/flights.yaml --channels 8",
    ],
    "scoring": ["tests/benchmarks/scoring.py --config conf/flights.yaml"],
}


def machine() -> str:
    """Return what ran them, in words."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    memory = psutil.virtual_memory().total / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in ("pyspark", "torch", "pyarrow"))
    return (
        f"{psutil.cpu_count()} cores of {names[0] if names else platform.machine()}, "
        f"{memory:.0f} GiB of memory; Python "
        f"{platform.python_version()}, {packages}"
    )


def printed(command: str) -> str:
    """Run a command and return what it printed, with what it is and when and how long it ran."""
    started = time.perf_counter()
    print(f"$ python {command}", flush=True)
    # What it logs goes to the terminal, as progress; the tables go to the page.
    done = subprocess.run(
        [sys.executable, *shlex.split(command)], stdout=subprocess.PIPE, text=True, check=True
    )
    print(done.stdout, flush=True)
    minutes = (time.perf_counter() - started) / 60
    today = datetime.datetime.now(datetime.UTC).date()
    return (
        f"    python {command}\n\n{done.stdout.strip()}\n\n"
        f"{today}, {minutes:.0f} min, on {machine()}.\n"
    )


def sections(page: Path) -> dict[str, str]:
    """Return the sections of a page by name, none where there is no page yet."""
    if not page.exists():
        return {}
    parts = page.read_text(encoding="utf-8").split("\n## ")[1:]
    named = (part.split("\n\n", 1) for part in parts)
    return {name: text.rstrip("\n") + "\n" for name, text in named}


def main() -> None:
    """Parse, run, write the page after each section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--output", type=Path, default=HERE / "results.md")
    arguments = parser.parse_args()
    pages = sections(arguments.output)
    for path, command in (need for name in arguments.only for need in NEEDED.get(name, [])):
        if not Path(path).exists():
            code = "from lc_spark.cli import main; main()"
            subprocess.run([sys.executable, "-c", code, *shlex.split(command)], check=True)
    for name in arguments.only:
        pages[name] = "\n".join(printed(command) for command in SECTIONS[name])
        body = "\n".join(f"## {n}\n\n{pages[n]}" for n in SECTIONS if n in pages)
        head = "# What the benchmarks printed\n\nWritten by `make bench`.\n\n"
        arguments.output.write_text(head + body, encoding="utf-8")
        print(f"Written: {arguments.output}", flush=True)


if __name__ == "__main__":
    main()
