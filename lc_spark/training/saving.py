"""Lets rank 0 write so that all ranks know when it could not, as on a full disk."""

from collections.abc import Callable, Mapping
from typing import Any

from lc_spark.errors import LcSparkError
from lc_spark.files import as_path
from lc_spark.training import models
from lc_spark.training.learner import Learner
from lc_spark.training.spec import LEARNER_FILE, TrainSpec
from lc_spark.training.tensors import save_tensors
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


def keep_model(
    spec: TrainSpec, learner: Learner, fingerprint: str, best: Mapping[str, Any]
) -> None:
    """Write the model of the best look at the valid split into spec.output."""
    folder = as_path(spec.output)
    models.save(learner.model, folder, fingerprint, {"name": spec.name, "best": best})
    if spec.keep_state:
        save_tensors(learner.state(), folder / LEARNER_FILE)
