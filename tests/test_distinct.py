"""How many values there will be: known exactly from all rows, closely from a few percent."""

import numpy as np
import pytest
from numpy.typing import NDArray

from lc_spark.distinct import often_enough

ROWS = 500_000


def counts_of(values: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.unique(values, return_counts=True)[1]


def zipf(size: int, exponent: float) -> NDArray[np.int64]:
    """Return ids of which value k of so many has a probability in proportion to k^-exponent."""
    weights = np.arange(1.0, size + 1) ** -exponent
    return np.random.default_rng(3).choice(size, ROWS, p=weights / weights.sum())


def test_all_rows_are_counted_not_estimated() -> None:
    found = often_enough(np.array([1, 2, 2, 5, 40]), 1.0, 2)
    assert (found.low, found.value, found.high) == (4, 4, 4)


def test_no_values_are_no_values() -> None:
    assert often_enough(np.array([], dtype=np.int64), 50.0, 2).value == 0


def test_values_that_are_all_frequent_are_all_there_are() -> None:
    assert often_enough(np.array([100, 300, 250]), 20.0, 5).value == pytest.approx(3)


@pytest.mark.parametrize(("share", "off"), [(0.01, 0.4), (0.03, 0.2), (0.1, 0.1)])
@pytest.mark.parametrize("min_count", [1, 2, 5])
@pytest.mark.parametrize("size", [20_000, 200_000])
def test_ids_by_zipfs_law_are_estimated_closely(
    size: int, min_count: int, share: float, off: float
) -> None:
    values = zipf(size, 0.75)
    truth = (counts_of(values) >= min_count).sum()
    sample = np.random.default_rng(4).choice(values, int(share * ROWS), replace=False)
    found = often_enough(counts_of(sample), 1 / share, min_count)
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(truth, rel=off)


def test_a_value_seen_often_is_not_certain_when_much_more_is_asked() -> None:
    found = often_enough(np.array([30] * 1_000), 2.0, 60)
    assert (
        450 < found.value < 600
    )  # 30 + a Poisson count of mean 30, at least 60 about half the time
