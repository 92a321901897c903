"""Turns the gradients of one step's rows into an update of many LRs over the same features.

The weights are a table [d, n], a column an LR. A step reads and writes the rows that a batch names,
and costs O(ids in the batch) whatever d is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lc_spark.training.optim import rows_of


class ProximalAdagrad:
    """FTRL-Proximal (McMahan 2011, AISTATS, "Follow-the-Regularized-Leader and Mirror Descent").

    Per-coordinate rates as Adagrad has them, learning_rate * f / (1 + sqrt(sum of g^2)), with f
    falling linearly to 0 over all steps so that what is frequent comes to rest.

    The penalty is MLlib's: mean loss + l2 / 2 |w|^2, that is rows * l2 / 2 |w|^2 against the sum of
    a pass' gradients. It stands in full from the first step on, as a prior would (a value of few
    rows must not run ahead before its penalty has come), and after one pass it grows by the pass
    as the sum of gradients does. A weight that is absent shrinks all the same: how far is known
    in closed form, and is caught up when a batch names it again. Plain decay at each update would
    punish what is frequent and spare what is rare, the reverse of what the objective says.
    """

    BETA = 1.0  # as the paper has it

    def __init__(
        self,
        d: int,
        penalties: Sequence[float],
        learning_rate: float,
        steps_per_epoch: int,
        epochs: int,
        device: torch.device,
    ) -> None:
        """Start n LRs at zero; penalties [n] are rows * l2 of each."""
        n = len(penalties)
        self.weights = torch.zeros(d, n, device=device)  # as they were after the step of `last`
        self.squares = torch.zeros(d, n, device=device)
        self.last = torch.zeros(d, dtype=torch.int32, device=device)  # steps done; 0: never met
        self.bias = torch.zeros(n, device=device)
        self.bias_squares = torch.zeros(n, device=device)
        self.penalties = torch.tensor(penalties, dtype=torch.float32, device=device)
        self.learning_rate = learning_rate
        self.steps_per_epoch, self.total_steps = steps_per_epoch, steps_per_epoch * epochs
        self.steps = 0

    def read(self, ids: Tensor) -> Tensor:
        """Return the weights [m, n] of ids int64 [m] as they are now."""
        last = self.last.index_select(0, ids)
        return self._now(rows_of(self.weights, ids), rows_of(self.squares, ids), last)

    def step(self, ids: Tensor, gradients: Tensor, bias_gradient: Tensor) -> None:
        """Update by the sums of the rows' gradients: [m, n] of distinct ids int64 [m], and [n]."""
        squares, weights = rows_of(self.squares, ids), rows_of(self.weights, ids)
        weights = self._now(weights, squares, self.last.index_select(0, ids))
        squares += gradients.square()
        self.steps += 1
        now = torch.tensor(self.steps, device=ids.device)
        proximal = self._proximal(squares, now)
        before, after = self._penalty(now - 1), self._penalty(now)
        weights = (weights * (proximal + before) - gradients) / (proximal + after)
        self.weights.index_copy_(0, ids, weights)
        self.squares.index_copy_(0, ids, squares)
        self.last.index_fill_(0, ids, self.steps)
        self.bias_squares += bias_gradient.square()
        self.bias -= bias_gradient / self._proximal(self.bias_squares, now)

    def settle(self) -> None:
        """Catch up all weights with the steps done, in parts, as a copy of a table would be big."""
        every = 1 << 20
        for at in range(0, len(self.last), every):
            part = slice(at, at + every)
            rows = self.weights[part], self.squares[part], self.last[part]
            self.weights[part] = self._now(*rows)
        self.last.fill_(self.steps)

    def _now(self, weights: Tensor, squares: Tensor, last: Tensor) -> Tensor:
        """Return weights [m, n] after the steps since `last` [m] in which they were absent."""
        then = last.unsqueeze(1)
        proximal = self._proximal(squares, then)
        now = self._penalty(torch.tensor(self.steps, device=last.device))
        return weights * ((proximal + self._penalty(then)) / (proximal + now))

    def _proximal(self, squares: Tensor, steps: Tensor) -> Tensor:
        """Return one over the learning rate, as it was in the last of so many steps."""
        factor = 1 - (steps - 1).clamp(min=0) / self.total_steps
        return (self.BETA + squares.sqrt()) / (self.learning_rate * factor)

    def _penalty(self, steps: Tensor) -> Tensor:
        return self.penalties * (steps / self.steps_per_epoch).clamp(min=1)

    def state(self) -> dict[str, Tensor]:
        """Return all that a later step depends on, by name; the optimiser's own tensors."""
        names = ("weights", "squares", "last", "bias", "bias_squares")
        return {name: getattr(self, name) for name in names}

    def load_state(self, named: dict[str, Tensor], steps: int) -> None:
        """Take over what state returned after so many steps, values copied."""
        for name, tensor in self.state().items():
            tensor.copy_(named[name])
        self.steps = steps
