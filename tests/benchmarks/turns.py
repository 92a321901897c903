"""Lets things take turns, and prints how long each took beside one of them."""

import statistics
import time
from collections.abc import Callable, Mapping


def take_turns(calls: Mapping[str, Callable[[], None]], times: int) -> dict[str, list[float]]:
    """Return the seconds of each call, so many times, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(times + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def print_turns(seconds: Mapping[str, list[float]], beside: str, rows: int) -> None:
    """Print a table of medians; the ratios are taken round by round."""
    print(f"| | median s | from | to | rows/s | by {beside} |")
    print("|---|---|---|---|---|---|")
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds[beside], strict=True)]
        median = statistics.median(taken)
        print(
            f"| {name} | {median:.2f} | {min(taken):.2f} | {max(taken):.2f} | {rows / median:,.0f} "
            f"| {statistics.median(ratios):.2f} |"
        )
