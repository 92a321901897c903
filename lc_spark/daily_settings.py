"""How runs by the day follow each other, as settings."""

from typing import Literal

from pydantic import Field

from lc_spark.field_kinds import Fraction, PositiveInt, Section


class Refresh(Section):
    """What a day's run takes over from the run whose model is the champion; for split by window.

    scratch: nothing. append: the field map grows, an index once given stays; LR and the networks go
    on from that run's weights.
    """

    mode: Literal["scratch", "append"] = "scratch"
    train_on: Literal["window", "new_days"] = Field(
        "window", description="append: all days of the window, or those since that run"
    )
    epochs: PositiveInt = Field(1, description="append: epochs of a network that goes on")
    expire_days: PositiveInt | None = Field(
        None, description="scratch: a value not seen for so many days leaves the vocabulary"
    )


class Gate(Section):
    """By how much a new model may be worse than the champion, on the same rows, and replace it."""

    auc: Fraction = Field(0.002, description="lower AUC")
    logloss: Fraction = Field(0.002, description="higher log loss")
    calibration: Fraction = Field(0.05, description="further from 1, predicted over observed")
    min_rows: PositiveInt = Field(1000, description="test rows, or nothing is decided")
    min_positives: PositiveInt = Field(100, description="positives among them")
