"""The gate: a new model replaces the champion only if it is not worse on the same rows."""

import dataclasses
import math

import pytest

from lc_spark.daily_settings import Gate
from lc_spark.gate import out_of_date, reasons_against, rolled_back
from lc_spark.metrics import Metrics

GATE = Gate(auc=0.002, logloss=0.002, calibration=0.05, min_rows=1000, min_positives=100)
OLD = Metrics(rows=5000, positives=700, auc=0.75, logloss=0.45, ne=0.9, calibration=1.02)


def worse(**changes: float) -> tuple[str, ...]:
    return reasons_against(GATE, dataclasses.replace(OLD, **changes), OLD)  # type: ignore[arg-type]


def test_the_same_and_a_better_model_pass() -> None:
    assert worse() == ()
    assert worse(auc=0.8, logloss=0.4, calibration=1.0) == ()


@pytest.mark.parametrize(
    ("key", "within", "beyond"),
    [
        ("auc", 0.7481, 0.7479),
        ("logloss", 0.4519, 0.4521),
        ("calibration", 1.069, 1.071),
        ("calibration", 0.931, 0.929),
    ],
)
def test_a_margin_is_what_it_says(key: str, within: float, beyond: float) -> None:
    assert worse(**{key: within}) == ()
    [reason] = worse(**{key: beyond})
    assert reason.startswith(f"{key} {beyond:.4f} is worse than {getattr(OLD, key):.4f} by ")
    assert f"gate.{key} is " in reason


def test_better_in_one_does_not_pay_for_worse_in_another() -> None:
    assert len(worse(auc=0.99, logloss=0.46)) == 1


def test_a_number_that_is_none_never_passes() -> None:
    assert len(worse(auc=math.nan, logloss=math.nan)) == 2


def test_too_few_rows_or_positives_decide_nothing_even_for_the_first() -> None:
    few = dataclasses.replace(OLD, rows=999, positives=99)
    assert reasons_against(GATE, few, None) == (
        "999 test rows, gate.min_rows is 1,000",
        "99 positives, gate.min_positives is 100",
    )
    assert reasons_against(GATE, OLD, None) == ()


def test_a_day_that_is_run_again_does_not_replace_a_later_one() -> None:
    assert out_of_date("2013-02-03", "2013-02-04") == (
        "the champion is of a later day, 2013-02-04",
    )
    for day, champion_day in (
        ("2013-02-04", "2013-02-04"),
        ("2013-02-05", "2013-02-04"),
        ("all", "all"),
        ("2013-02-05", "all"),
    ):
        assert out_of_date(day, champion_day) == ()


def test_what_was_rolled_back_by_hand_stays_so_when_its_day_is_run_again() -> None:
    tags = {"promoted_at": "2013-02-04", "rolled_back_at": "2013-02-05"}
    [reason] = rolled_back({**tags, "rolled_back_why": "clicks fell"})
    assert reason.startswith("it was rolled back (clicks fell)")
    assert rolled_back({"promoted_at": "2013-02-04", "rolled_back_why": "taken back since"}) == ()
