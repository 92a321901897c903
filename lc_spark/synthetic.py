"""Makes a click log from a seed alone, with every row's true probability beside its label.

Nothing in it was observed. It is there because the best AUC and log loss that a model can reach
are known, and which part of the logit is additive, which needs a cross and which a network.
"""

import datetime
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lc_spark.made_logits import bounded, intercept, sigmoid, together

Random = np.random.Generator
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Codes = dict[str, Ints]
Numbers = dict[str, Floats | Ints]

FIRST_DAY = datetime.date(2024, 4, 1)  # a Monday
DAYS = 30
PAST = np.arange(DAYS)[:, None] / DAYS  # share of the log before each day
RATE = 0.17  # mean of the true probability
TURN = 0.6  # radians by which effects turn over the log; first and last day correlate by cos(0.6)

SIZES = {
    **{"user_id": 4000, "segment": 8, "age_group": 6, "country": 25},
    **{"item_id": 3000, "category": 20, "brand": 150, "seller": 300},
    **{"hour": 24, "weekday": 7, "device": 4, "placement": 10},
}
# Standard deviations of the effects of a field's values, in the sum that the field belongs to.
WHO = {"user_id": 0.4, "segment": 0.3, "age_group": 0.2, "country": 0.35, "interests": 0.25}
WHAT = {"item_id": 0.4, "category": 0.35, "brand": 0.3, "seller": 0.2}
WHERE = {"hour": 0.2, "weekday": 0.1, "device": 0.25, "placement": 0.45}
# Standard deviations of the effects of pairs of values.
PAIRS = {("segment", "category"): 0.7, ("hour", "device"): 0.5, ("country", "brand"): 0.6}

FAVOURITES = 4  # categories that a user looks at
LAUNCHED_LATER = 0.4  # share of the items that come after the first day
HIDDEN_AGE = 0.12  # share of the users
FIRST_VISIT = 0.12  # share of the rows
UNRATED_DAYS = 5  # a younger item has no rating yet
LOST = {"brand": 0.05, "price": 0.02}  # share of the rows, whatever the value is

WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
DEVICES = ("phone", "tablet", "desktop", "tv")


def synthetic(rows: int = 300_000, seed: int = 2017) -> pd.DataFrame:
    """Return a made-up click log of 30 days: a row an impression, in the order of the days.

    The same rows and seed give the same log, another seed another world. Columns: impression (row
    number), date, clicked (0 or 1), true_probability, and what is known before the click: user_id,
    segment, age_group, country, interests (categories joined by ``|``), days_since_visit, item_id,
    category, brand, seller, price, discount, item_age_days, rating, hour, weekday, device,
    placement. Labels come about so, t being the row's day / 30:

    - A value v of a field has the effect e[v](t) = n1[v] cos(0.6 t) + n2[v] sin(0.6 t), n1 and n2
      drawn from a normal distribution and brought to mean 0 and the sd of the field.
    - who = e[user_id] + e[segment] + e[country] + sum of e[interests]
      + (e[age_group], or -0.5 where the age is hidden)
      + (0.6 exp(-days_since_visit / 4) - 0.2, or -0.6 at a first visit).
    - what = e[item_id] + e[category] + e[brand] + e[seller] + 0.3 (1 - min(z^2, 4))
      + 2 discount - 0.1 + 0.8 exp(-item_age_days / 7) - 0.1
      + (0.35 (rating - 3.8), or 0 before there is one), z = ln(price / 25) / 0.8.
    - where = e[hour] + e[weekday] + e[device] + e[placement].
    - pairs = g[segment, category](t) + g[hour, device](t) + g[country, brand](t), with g like e,
      and mean 0 over each value of either field, all values counted alike.
    - s = who + what + where + 1.3 who what + 1.2 |who + where| + pairs, and
      logit = b + 4 tanh(s / 4), with b such that the mean probability is 0.17.
    - true_probability = 1 / (1 + exp(-logit)), to six digits; clicked ~ Bernoulli of it.

    LR on single fields reaches who + what + where; a network over one scalar a field also product,
    absolute value and tanh; crosses (or several values a field) the pairs.

    Users and items are Zipf. Each day shares of countries, devices and placements move, and new
    items appear, which are shown often at first. Missing: age_group by 12 % of the users,
    days_since_visit at first visits, rating of items younger than 5 days, interests where there
    are none (all of which say something), brand and price lost at random (which say nothing: the
    true value still acts).
    """
    world, log = np.random.default_rng(seed).spawn(2)
    day = _days(log, rows)
    codes = _who(world, log, day) | _what(world, log, day) | _where(world, log, day)
    interests = _interests(world, log, codes["user_id"])
    numbers = _numbers(world, log, day, codes.pop("age"), codes["item_id"])
    probability = _probability(world, day, codes, interests, numbers)
    clicked = log.random(rows) < probability
    numbers["price"] = _with_lost(log, "price", numbers["price"], np.nan)
    numbers["rating"][numbers["item_age_days"] < UNRATED_DAYS] = np.nan
    dates = np.array([FIRST_DAY + datetime.timedelta(days=n) for n in range(DAYS)], dtype=object)
    return pd.DataFrame(
        {
            "impression": np.arange(rows),
            "date": dates[day],
            "clicked": clicked.astype(np.int8),
            "true_probability": probability,
            **_texts(log, codes),
            "interests": _joined(interests),
            **numbers,
        }
    )


def _days(log: Random, rows: int) -> Ints:
    """Return the day of each row, ascending; weekends are busier."""
    busy = np.where(np.arange(DAYS) % 7 >= 5, 1.3, 1.0)
    return np.repeat(np.arange(DAYS), log.multinomial(rows, busy / busy.sum()))


def _zipf(n: int, exponent: float, flat: int = 1) -> Floats:
    """Return the weights of n values by rank, Zipf-Mandelbrot."""
    return (np.arange(n) + 1.0 + flat) ** -exponent


def _attribute(world: Random, name: str, owners: int, exponent: float) -> Ints:
    """Return a value of the field for each of so many users or items."""
    weights = _zipf(SIZES[name], exponent)
    return world.choice(SIZES[name], size=owners, p=weights / weights.sum())


def _draw(log: Random, day: Ints, weights: Floats) -> Ints:
    """Draw a value a row by the weights of its day; weights is (days, values), of any scale."""
    uniform = log.random(len(day))
    starts = np.searchsorted(day, np.arange(DAYS + 1))
    drawn = np.empty(len(day), dtype=np.int64)
    for today, (start, stop) in enumerate(itertools.pairwise(starts)):
        edges = np.cumsum(weights[today])
        drawn[start:stop] = np.searchsorted(edges, uniform[start:stop] * edges[-1], side="right")
    return drawn


def _who(world: Random, log: Random, day: Ints) -> Codes:
    """Return users and their attributes; age_group is -1 where the user hides it."""
    n = SIZES["user_id"]
    segment = _attribute(world, "segment", n, 0.5)
    age_group = _attribute(world, "age_group", n, 0.2)
    age_group[world.random(n) < HIDDEN_AGE] = -1
    country = _attribute(world, "country", n, 0.8)
    growth = world.normal(0, 0.8, SIZES["country"])[country]
    user = _draw(log, day, _zipf(n, 0.8, flat=20) * np.exp(growth * PAST))
    attributes = {"segment": segment, "age_group": age_group, "country": country}
    return {"user_id": user, **{name: values[user] for name, values in attributes.items()}}


def _what(world: Random, log: Random, day: Ints) -> Codes:
    """Return items, their attributes and their age in days."""
    n = SIZES["item_id"]
    exponents = {"category": 0.5, "brand": 0.8, "seller": 0.8}
    attributes = {name: _attribute(world, name, n, e) for name, e in exponents.items()}
    later = world.random(n) < LAUNCHED_LATER
    launch = np.where(later, world.integers(1, DAYS, n), -world.integers(0, 200, n))
    age = np.arange(DAYS)[:, None] - launch
    shown = np.where(age >= 0, 1 + 2 * np.exp(-np.maximum(age, 0) / 5), 0.0)
    item = _draw(log, day, _zipf(n, 1.0, flat=10) * shown)
    codes = {"item_id": item, **{name: values[item] for name, values in attributes.items()}}
    return codes | {"age": day - launch[item]}


def _where(world: Random, log: Random, day: Ints) -> Codes:
    """Return what is around an impression."""
    hour = 1.1 + np.sin((np.arange(24) - 12) * np.pi / 12)  # busiest at 18
    device = np.array([5.0, 1.0, 3.0, 1.0]) * np.exp(PAST * [0.6, 0.0, -0.6, 0.5])
    trend = world.normal(0, 0.5, SIZES["placement"])
    placement = _zipf(SIZES["placement"], 0.7) * np.exp(PAST * trend)
    return {
        "hour": _draw(log, day, np.tile(hour, (DAYS, 1))),
        "weekday": day % 7,
        "device": _draw(log, day, device),
        "placement": _draw(log, day, placement),
    }


def _interests(world: Random, log: Random, user: Ints) -> Ints:
    """Return the categories looked at of late, a set a row: (rows, FAVOURITES), -1 for none."""
    order = world.random((SIZES["user_id"], SIZES["category"])).argsort(axis=1, kind="stable")
    favourites = order[:, :FAVOURITES][user]
    return np.where(log.random(favourites.shape) < 0.5, favourites, -1)


def _numbers(world: Random, log: Random, day: Ints, age: Ints, item: Ints) -> Numbers:
    """Return the numeric columns as they act; NaN only at a first visit."""
    rows = len(day)
    z = world.normal(0, 1, SIZES["item_id"])[item] + log.normal(0, 0.05, rows)
    rating = world.normal(3.8, 0.6, SIZES["item_id"])[item] + log.normal(0, 0.05, rows)
    discounted = log.random(rows) < 0.25
    first = log.random(rows) < FIRST_VISIT
    return {
        "price": np.round(25 * np.exp(0.8 * z), 2),
        "discount": np.where(discounted, log.integers(1, 9, rows) / 20, 0.0),
        "item_age_days": age,
        "rating": np.round(np.clip(rating, 1, 5), 2),
        "days_since_visit": np.where(first, np.nan, np.round(log.exponential(5, rows), 2)),
    }


class _Effects:
    """Effects of values, or of pairs of values, that turn from one normal draw to another."""

    def __init__(self, world: Random, shape: tuple[int, ...], sd: float) -> None:
        self.first, self.second = (sd * _standardised(world.normal(0, 1, shape)) for _ in "12")

    def of(self, day: Ints, *codes: Ints) -> Floats:
        """Return the effect in each row, given its day and its value (or values) as codes."""
        angle = TURN * day / DAYS
        turned: Floats = self.first[codes] * np.cos(angle) + self.second[codes] * np.sin(angle)
        return turned


def _standardised(effects: Floats) -> Floats:
    """Return effects with mean 0 along each axis (no part of a pair's is additive) and sd 1."""
    for axis in range(effects.ndim):
        effects = effects - effects.mean(axis=axis, keepdims=True)
    standardised: Floats = effects / effects.std()
    return standardised


def _probability(
    world: Random, day: Ints, codes: Codes, interests: Ints, numbers: Numbers
) -> Floats:
    """Return the true probability of a click, by the formulas that ``synthetic`` gives."""
    effects = {
        name: _Effects(world, (SIZES[name],), sd).of(day, codes[name])
        for name, sd in (WHO | WHAT | WHERE).items()
        if name != "interests"
    }
    effects["age_group"][codes["age_group"] < 0] = -0.5
    interest = _Effects(world, (SIZES["category"],), WHO["interests"])
    effects["interests"] = sum(
        (np.where(one >= 0, interest.of(day, one), 0.0) for one in interests.T),
        start=np.zeros(len(day)),
    )
    visit = numbers["days_since_visit"]
    who = _sum(effects, WHO) + np.where(np.isnan(visit), -0.6, 0.6 * np.exp(-visit / 4) - 0.2)
    z = np.log(numbers["price"] / 25) / 0.8
    age = numbers["item_age_days"]
    what = (
        _sum(effects, WHAT)
        + 0.3 * (1 - np.minimum(z**2, 4))
        + (2 * numbers["discount"] - 0.1)
        + (0.8 * np.exp(-age / 7) - 0.1)
        + np.where(age < UNRATED_DAYS, 0.0, 0.35 * (numbers["rating"] - 3.8))
    )
    where = _sum(effects, WHERE)
    logit = together(who, what, where)
    for (one, other), sd in PAIRS.items():
        logit += _Effects(world, (SIZES[one], SIZES[other]), sd).of(day, codes[one], codes[other])
    logit = bounded(logit)
    # Six digits: the label does not hang on how a machine rounds exp.
    return np.round(sigmoid(logit + intercept(logit, RATE)), 6)


def _sum(effects: dict[str, Floats], names: dict[str, float]) -> Floats:
    total: Floats = np.sum([effects[name] for name in names], axis=0)
    return total


def _texts(log: Random, codes: Codes) -> dict[str, npt.NDArray[np.object_]]:
    """Return the categorical columns as text, with what is missing as None."""
    named = {"weekday": WEEKDAYS, "device": DEVICES, "hour": [str(hour) for hour in range(24)]}
    columns = {}
    for name, values in codes.items():
        names = named.get(name) or [f"{name.removesuffix('_id')}_{n}" for n in range(SIZES[name])]
        # The code -1 reads the last entry: missing.
        columns[name] = np.array([*names, None], dtype=object)[_with_lost(log, name, values, -1)]
    return columns


def _with_lost(log: Random, name: str, values: Any, missing: float) -> Any:
    """Return values with LOST[name] of them replaced by ``missing``, at random."""
    return np.where(log.random(len(values)) < LOST.get(name, 0.0), missing, values)


def _joined(interests: Ints) -> list[str | None]:
    names = [f"category_{n}" for n in range(SIZES["category"])]
    return ["|".join(names[c] for c in row if c >= 0) or None for row in interests.tolist()]
