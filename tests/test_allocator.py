"""What a process that trains holds of its memory: measured in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Prints the kB in huge pages of a table, and the new pages that making ten layers anew took.
MEASURED = """
import re, resource
from pathlib import Path

import torch

from lc_spark.training.world import joined

with joined("cpu"):
    table = torch.zeros(100_000_000)
    held = Path("/proc/self/smaps_rollup").read_text()
    for step in range(20):
        if step == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        layer = torch.ones(4096, 1024)
        del layer
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    print(re.search(r"AnonHugePages: +([0-9]+) kB", held)[1], after - before)
"""


@pytest.mark.skipif(not HUGE_PAGES.is_file(), reason="a Linux without transparent huge pages")
def test_a_rank_has_huge_pages_and_keeps_what_it_frees() -> None:
    """A table of 400 MB lies in huge pages; a layer of 16 MB that is made again finds its pages.

    A page is 4 kB: a layer that is given back and made anew would take 4,096 of them each time.
    """
    if "[never]" in HUGE_PAGES.read_text():
        pytest.skip("transparent huge pages are off on this machine")
    command = [sys.executable, "-c", MEASURED]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    huge, new = map(int, done.stdout.split())
    assert huge > 300_000
    assert new < 4096
