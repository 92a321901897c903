"""What a process that trains holds of its memory: measured in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Prints the kB in huge pages of a table of 400 MB.
TABLE = """
import re
from pathlib import Path

import torch

from lc_spark.training.world import joined

with joined("cpu"):
    table = torch.zeros(100_000_000)
    held = Path("/proc/self/smaps_rollup").read_text()
    print(re.search(r"AnonHugePages: +([0-9]+) kB", held)[1])
"""
# Prints the new pages that a layer of 32 MB took, made ten times after it was made before.
LAYERS = """
import resource

import torch

from lc_spark.training.world import joined

with joined("cpu"):
    for step in range(20):
        if step == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        layer = torch.ones(4096, 2048)
        del layer
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def printed(code: str, huge_pages: bool) -> int:
    """Return the number that a process prints."""
    # A rank asks for them by itself.
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    if not huge_pages:
        environment["THP_MEM_ALLOC_ENABLE"] = "0"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(
    not HUGE_PAGES.is_file() or "[never]" in HUGE_PAGES.read_text(),
    reason="this machine has no transparent huge pages, or has them off",
)
def test_a_table_of_a_rank_lies_in_huge_pages() -> None:
    """Of 400 MB at least 300."""
    assert printed(TABLE, huge_pages=True) > 300_000


def test_a_rank_keeps_what_it_frees() -> None:
    """A layer of 8,192 pages, made ten times again, finds nearly all of them where it left them.

    Without huge pages of torch, of which it would take so few that nothing could be told.
    """
    assert printed(LAYERS, huge_pages=False) < 800
