"""Tells torch and glibc how to hold the large tensors of a training process."""

import ctypes
import os
import sys

# Parameters of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 64 << 20  # bytes of a block that is kept when it is freed: a layer's activations
MOST_KEPT = 256 << 20  # bytes at the end of the heap


def keep_memory() -> None:
    """Let tensors lie in huge pages, and let the process keep what it frees.

    Rows of M1 are read all over a table of hundreds of megabytes: with pages of 4 kB each read
    walks the page table, in a virtual machine that of the host too. And glibc returns large freed
    blocks to the system at once, so that every step would meet its own memory as new pages. Call
    it before the first tensor. Where Linux has transparent huge pages off, or Python runs on
    another C library, that part changes nothing.
    """
    if sys.platform != "linux":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch; 0 turns it off
    glibc = ctypes.CDLL(None)
    if hasattr(glibc, "mallopt"):
        glibc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        glibc.mallopt(M_TRIM_THRESHOLD, MOST_KEPT)
