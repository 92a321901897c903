"""Turns the sums of effects that a made-up log draws into logits, and logits into probabilities."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Weights of the product and of the absolute value, and what the sum saturates at.
PRODUCT = 1.3
ABSOLUTE = 1.2
BOUND = 4.0


def together(who: Floats, what: Floats, where: Floats) -> Floats:
    """Return the three sums added up, with a product and an absolute value of them."""
    logit: Floats = who + what + where + PRODUCT * who * what + ABSOLUTE * np.abs(who + where)
    return logit


def bounded(logit: Floats) -> Floats:
    """Return logits that saturate at +-BOUND."""
    saturated: Floats = BOUND * np.tanh(logit / BOUND)
    return saturated


def sigmoid(logit: Floats) -> Floats:
    """Return 1 / (1 + exp(-logit))."""
    return 1 / (1 + np.exp(-logit))


def intercept(logit: Floats, rate: float) -> float:
    """Return b with mean sigmoid(logit + b) = rate, by bisection."""
    low, high = -20.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        if sigmoid(logit + middle).mean() > rate:
            high = middle
        else:
            low = middle
    return low
