"""Where the time of a training step goes, in an older tree of this repository and in this one.

    git archive 1011133 --prefix=old/ | tar -x -C FOLDER
    python tests/benchmarks/before_after.py FOLDER/old [--precision bfloat16]

Each tree's own training_step.py --profile, the two in turns; the table has the median of the turns
and their range, in ms a step.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LINE = re.compile(r"\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|")
STARTS = ("M1 frozen", "M1 joint", "random start")


def profile(tree: Path, precision: str) -> dict[str, list[float]]:
    """Return ms by part of a step, one number a start of M1."""
    command = [sys.executable, str(tree / "tests/benchmarks/training_step.py"), "--profile"]
    done = subprocess.run(
        [*command, "--precision", precision],
        env={**os.environ, "PYTHONPATH": str(tree)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {part: [float(ms) for ms in each] for part, *each in LINE.findall(done.stdout)}


def main() -> None:
    """Parse, take turns, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--times", type=int, default=5)
    arguments = parser.parse_args()
    trees = {"before": arguments.old.resolve(), "after": ROOT}
    found: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for number in range(arguments.times):
        for name, tree in trees.items():
            print(f"{number + 1} of {arguments.times}, {name}", file=sys.stderr)
            for part, ms in profile(tree, arguments.precision).items():
                found[part][name].append(ms)
    print("| | " + " | ".join(f"{start}, {name}" for start in STARTS for name in trees) + " |")
    print("|---" * (1 + 2 * len(STARTS)) + "|")
    for part in [*sorted(part for part in found if part != "all"), "all"]:
        cells = []
        for i in range(len(STARTS)):
            for name in trees:
                each = [ms[i] for ms in found[part][name]]
                cells.append(f"{statistics.median(each):.1f} ({min(each):.1f}–{max(each):.1f})")
        print(f"| {part} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
