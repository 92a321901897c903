"""Decides whether MLlib or torch fits LR, by what MLlib would hold on the driver."""

import logging

from lc_spark.errors import LcSparkError
from lc_spark.systems import Lr

log = logging.getLogger("lc_spark")

# Dense vectors of d doubles that MLlib's L-BFGS holds: the differences of weights and of gradients
# of 10 corrections, and weights, gradients, directions and the sums that they come from.
VECTORS = 2 * 10 + 12


def mllib_bytes(d: int, tasks: int) -> int:
    """Return what MLlib's driver holds for LR over d features.

    tasks is the number of tasks that share the driver's memory, each with a gradient: those of a
    local master, 0 on a cluster.
    """
    return 8 * d * (VECTORS + tasks)


def fitted_by(settings: Lr, d: int, tasks: int, driver_bytes: int) -> str:
    """Return "mllib" or "torch" for d features and a driver with so many bytes of memory."""
    if settings.by != "auto":
        return settings.by
    return "mllib" if mllib_bytes(d, tasks) <= driver_bytes else "torch"


def chosen(settings: Lr, d: int, tasks: int, driver_bytes: int) -> str:
    """Return what ``fitted_by`` does, and say why.

    Raises LcSparkError when the settings ask for MLlib and it cannot fit.
    """
    by, needed = fitted_by(settings, d, tasks, driver_bytes), mllib_bytes(d, tasks)
    numbers = (
        f"MLlib's LR over {d:,} features needs {needed / 1e9:,.2f} GB on the driver, which has "
        f"{driver_bytes / 1e9:,.2f} GB"
    )
    if settings.by == "auto":
        log.info("train_lr: by %s: %s", by, numbers)
    elif by == "mllib" and needed > driver_bytes:
        raise LcSparkError(
            f"{numbers}: set lr.by to torch (--set lr.by=torch), or raise spark.driver_memory."
        )
    return by
