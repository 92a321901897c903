"""Lets rank 0 write a file so that all ranks know when it could not, as on a full disk."""

from collections.abc import Callable

from lc_spark.errors import LcSparkError
from lc_spark.training.world import World


def save(world: World, write: Callable[[], None]) -> None:
    """Call write on rank 0. Collective; raises LcSparkError on every rank when it fails.

    An error of rank 0 alone would end it, and reach the driver without its words.
    """
    failure = ""
    if world.rank == 0:
        try:
            write()
        except OSError as error:
            failure = str(error)
    if world.from_rank_0(len(failure)):
        raise LcSparkError(f"Rank 0 could not save: {failure}.")
