"""Turns encoded or raw rows into scores with a stored model; needs no Spark and no MLflow."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from lc_spark.encoder import Vocabulary, encode
from lc_spark.field_map import FieldMap, require_same
from lc_spark.pandas_rows import prepare_pandas
from lc_spark.training import models

CHUNK_ROWS = 8192  # rows scored at once: bounds the memory of the hidden layers


class Scorer:
    """A bundle, ready to score: field map, vocabulary and model with one fingerprint."""

    def __init__(self, folder: Path) -> None:
        """Read a bundle folder; raises LcSparkError when its parts do not belong together."""
        self.field_map = FieldMap.read(folder / "field_map.json")
        self.vocabulary = Vocabulary.read(folder / "vocabulary.parquet")
        self.model, description = models.load(folder)
        require_same(self.field_map.fingerprint, description["fingerprint"], "The model")

    def score_pandas(self, raw: pd.DataFrame) -> NDArray[np.float64]:
        """Return the scores [n] of raw rows; a missing column is a missing value in every row."""
        return self.score_prepared(prepare_pandas(raw, self.field_map))

    def score_prepared(self, columns: Mapping[str, pa.Array]) -> NDArray[np.float64]:
        """Return the scores [n] of prepared columns (see encoder.encode)."""
        encoded = encode(columns, self.field_map, self.vocabulary)
        return score_encoded(self.model, encoded, self.field_map)


def score_encoded(
    model: models.Network, encoded: Mapping[str, NDArray[Any]], field_map: FieldMap
) -> NDArray[np.float64]:
    """Return the scores [n] of encoded columns (see encoder.encode)."""
    return score_ids(model, *models.to_tensors(encoded, field_map))


def score_ids(model: models.Network, ids: Tensor, values: Tensor | None) -> NDArray[np.float64]:
    """Return the scores [n] of model input [n, C]; the sigmoid is taken in float64."""
    logits = []
    with torch.inference_mode():
        for start in range(0, len(ids), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits.append(model(ids[rows], None if values is None else values[rows]))
    if not logits:
        return np.zeros(0)
    return torch.cat(logits).double().sigmoid().numpy()
