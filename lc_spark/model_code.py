"""The registered model, raw rows in and scores out: the script that MLflow runs to load it.

MLflow calls this "models from code": nothing is pickled.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from numpy.typing import NDArray

from lc_spark.errors import LcSparkError
from lc_spark.training.scorer import Scorer


class ClickModel(PythonModel):
    """The registered model: raw rows in, scores out."""

    def load_context(self, context: Any) -> None:
        """Read the bundle: field map, vocabulary and weights; nothing is unpickled."""
        self.scorer = Scorer(Path(context.artifacts["bundle"]))

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> NDArray[np.float64]:
        """Return float64 scores [n] of n raw rows; a column that is not there counts as missing.

        Raises MlflowException, which MLflow's server answers as status 400, on a value that does
        not fit its column, and when not one of the model's raw columns is there.
        """
        known = self.scorer.field_map.raw_columns
        if not set(known) & set(model_input.columns):
            said = f"The rows have none of the model's columns: {', '.join(known)}."
            raise MlflowException.invalid_parameter_value(said)
        try:
            scores: NDArray[np.float64] = self.scorer.score_pandas(model_input)
        except LcSparkError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return scores


set_model(ClickModel())
