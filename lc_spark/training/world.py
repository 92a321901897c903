"""Turns torchrun's environment variables into this rank's place among the others.

The only file that starts or ends a process group; the collectives that the others need are methods.
"""

import os
import socket
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

# Its functions keep the default group as of its import. An optimiser's first step imports it: in
# the group, which then outlived destroy_process_group, with threads that could abort the exit.
import torch.distributed.nn.functional
from torch import Tensor
from tqdm import tqdm

from lc_spark.errors import LcSparkError
from lc_spark.training.allocator import keep_memory

PROGRESS_SECONDS = 5.0
SECONDS_TO_REPORT = 10.0  # after which a rank may report that another one is gone


@dataclass(frozen=True)
class World:
    """One rank of several; each method but `say` is a collective, called by every rank.

    sent counts the bytes that this rank gave to `mean` and to `gather` for the others.
    """

    rank: int
    size: int
    device: torch.device
    sent: Counter[str] = field(default_factory=Counter)

    def mean(self, tensor: Tensor) -> Tensor:
        """Set the tensor to its mean over ranks and return it."""
        if self.size > 1:
            self.sent["mean"] += tensor.nbytes
            with _among_others():
                dist.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def gather(self, part: Tensor) -> Tensor:
        """Return every rank's part [n_rank, ...] one after the other, the same on each rank.

        The parts may differ in length: they travel padded to the longest.
        """
        if self.size == 1:
            return part
        length = torch.tensor([len(part)], device=part.device)
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        with _among_others():
            dist.all_gather(lengths, length)
        counts = [int(n) for n in lengths]
        padded = part.new_zeros(max(counts), *part.shape[1:])
        padded[: len(part)] = part
        self.sent["gather"] += length.nbytes + padded.nbytes
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with _among_others():
            dist.all_gather(parts, padded)
        return torch.cat([p[:n] for p, n in zip(parts, counts, strict=True)])

    def from_rank_0(self, number: int) -> int:
        """Return the number that rank 0 has."""
        tensor = torch.tensor([number], device=self.device)
        if self.size > 1:
            with _among_others():
                dist.broadcast(tensor, src=0)
        return int(tensor)

    def ranks_on_this_host(self) -> int:
        """Return how many ranks share this host's cores and memory."""
        name = zlib.crc32(socket.gethostname().encode())
        host = torch.tensor([name], device=self.device)
        return int((self.gather(host) == host).sum())

    def say(self, text: str) -> None:
        """Print a line, once: on rank 0."""
        if self.rank == 0:
            print(text, flush=True)


@contextmanager
def _among_others() -> Iterator[None]:
    """Give a rank that is gone the time to be reported before those that miss it are."""
    try:
        yield
    except RuntimeError:
        time.sleep(SECONDS_TO_REPORT)
        raise


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Enter the group of ranks that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    device is cpu (gloo) or cuda (nccl). Without the variables this process is the only rank. The
    ranks of a host share its cores: torch gets cores // ranks threads.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if device == "cuda":
        if not torch.cuda.is_available():
            raise LcSparkError("training.device is cuda, but torch finds no GPU: set it to cpu.")
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    world = World(rank, size, torch.device(device))
    threads = torch.get_num_threads()
    keep_memory()
    if size > 1:
        dist.init_process_group("gloo" if device == "cpu" else "nccl")
        # On an executor the folder names the application and the executor.
        place = f"host {socket.gethostname()}, process {os.getpid()}, {Path.cwd()}"
        print(f"rank {rank} of {size}: {place}", flush=True)
    try:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.ranks_on_this_host()))
        yield world
    finally:
        torch.set_num_threads(threads)
        if size > 1:
            dist.destroy_process_group()


def progress_bar(world: World, title: str, rows: int) -> "tqdm[NoReturn]":
    """Return a bar over rows that rank 0 shows."""
    return tqdm(
        desc=title,
        total=rows,
        unit=" rows",
        unit_scale=True,
        mininterval=PROGRESS_SECONDS,
        ascii=True,
        disable=world.rank != 0,
        file=LineStream(),
    )


class LineStream:
    """A text stream for progress bars that ends each state of the bar with a newline.

    TorchDistributor passes output on line by line: a bar that goes back by \\r would come all at
    once, at its end.
    """

    def write(self, text: str) -> None:
        """Write the bar's state as a line."""
        if text.strip():
            print(text.strip(), file=sys.stdout)

    def flush(self) -> None:
        """Pass on what was written."""
        sys.stdout.flush()
