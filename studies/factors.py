"""Parity factors: how much less one arm spends than another for the same accuracy, with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import ndtri, stdtrit

LEVEL = 0.95  # of all intervals
DRAWS = 4000  # of the bootstrap
EQUAL = 1e-9  # per cent: accuracies that rounding alone tells apart


@dataclass(frozen=True)
class Curve:
    """Accuracy against cost, of one arm.

    The noise of an arm is taken to be the same at all its budgets: a few seeds at one budget say little about it.

    Attributes:
        costs: (K, S), above 0: of K budgets, S seeds each.
        accuracies: (K, S), per cent.
    """

    costs: np.ndarray
    accuracies: np.ndarray

    @cached_property
    def cost(self) -> np.ndarray:
        """(K,): geometric means over the seeds."""
        return np.exp(np.log(self.costs).mean(1))

    @cached_property
    def accuracy(self) -> np.ndarray:
        """(K,): means over the seeds, per cent."""
        return self.accuracies.mean(1)

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the deviation over seeds."""
        budgets, seeds = self.accuracies.shape
        return budgets * (seeds - 1)

    @property
    def half_width(self) -> float | None:
        """Of the t-interval of a budget's mean accuracy, the seeds' variance pooled; None with one seed."""
        if not self.freedom:
            return None
        deviation = math.sqrt(self.accuracies.var(1, ddof=1).mean())
        return float(stdtrit(self.freedom, (1 + LEVEL) / 2) * deviation / math.sqrt(self.accuracies.shape[1]))

    def draws(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Means that other seeds might have given: (DRAWS, K) logarithms of costs, and accuracies.

        A bootstrap of the residuals of all budgets, accuracy and cost of a seed together. They are widened by what the
        estimate of a mean takes away from them, and as the t-distribution is wider than the normal one.
        """
        budgets, seeds = self.accuracies.shape
        wider = math.sqrt(seeds / (seeds - 1)) * stdtrit(self.freedom, (1 + LEVEL) / 2) / ndtri((1 + LEVEL) / 2)
        picked = generator.integers(budgets * seeds, size=(DRAWS, budgets, seeds))
        found = []
        for values in (np.log(self.costs), self.accuracies):
            means = values.mean(1)
            residuals = wider * (values - means[:, None]).ravel()
            found.append(means + residuals[picked].mean(-1))
        return found[0], found[1]


@dataclass(frozen=True)
class Factor:
    """The cost of one arm divided by what another arm needs for the same accuracy.

    Attributes:
        value: 0 where the other never reaches the accuracy, infinite where its smallest budget exceeds it.
        low, high: the interval, 0 and infinite likewise; None with one seed.
        least, most: the smallest and largest factor that the other's budgets can show.
    """

    value: float
    low: float | None
    high: float | None
    least: float
    most: float

    @property
    def state(self) -> str:
        return {0.0: "unreachable", math.inf: "below the smallest budget"}.get(self.value, "measured")

    def text(self) -> str:
        """``3.41 (2.90 to 4.02)``; ``> 5.00`` and ``< 1.25`` where the other's budgets end."""
        value = self._written(self.value)
        if self.low is None or self.high is None:
            return value
        low, high = self._written(self.low), self._written(self.high)
        return value if low == high else f"{value} ({low} to {high})"

    def _written(self, value: float) -> str:
        if value == 0:
            return f"< {self.least:.2f}"
        return f"> {self.most:.2f}" if value == math.inf else f"{value:.2f}"


def rising(values: np.ndarray) -> np.ndarray:
    """Isotonic regression along the last axis: the nearest that never fall, in least squares.

    Args:
        values: (N, K).

    Returns:
        (N, K): at k, the largest over i <= k of the smallest over j >= k of the mean of i ... j.
    """
    sums = np.cumsum(np.pad(values, ((0, 0), (1, 0))), axis=1)
    count = values.shape[1]
    found = np.empty(values.shape)
    for k in range(count):
        lows = [
            np.min([(sums[:, j + 1] - sums[:, i]) / (j + 1 - i) for j in range(k, count)], axis=0) for i in range(k + 1)
        ]
        found[:, k] = np.max(lows, axis=0)
    return found


def log_cost_of(log_costs: np.ndarray, accuracies: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The cost at which curves reach an accuracy: linear in the cost's logarithm between points that never fall.

    Args:
        log_costs, accuracies: (N, K), of N curves.
        wanted: (N,).

    Returns:
        (N,): logarithms; infinite where a curve never reaches it, minus infinity where its first point exceeds it.
    """
    order = np.argsort(log_costs, axis=1, kind="stable")
    x, y = np.take_along_axis(log_costs, order, 1), rising(np.take_along_axis(accuracies, order, 1))
    reached = y >= wanted[:, None] - EQUAL
    rows, first = np.arange(len(x)), reached.argmax(1)
    before = np.maximum(first - 1, 0)
    x0, x1, y0, y1 = x[rows, before], x[rows, first], y[rows, before], y[rows, first]
    share = np.clip(np.divide(wanted - y0, y1 - y0, out=np.ones_like(y0), where=y1 > y0), 0, 1)
    found = x0 + share * (x1 - x0)
    found[(first == 0) & (y[:, 0] > wanted + EQUAL)] = -np.inf
    found[~reached.any(1)] = np.inf
    return found


def target(curve: Curve, at: int) -> int:
    """Which point of a curve is to be matched: ``at``, or a cheaper one where that gained nothing over it.

    It is the first whose mean lies within the interval of the best mean up to ``at``; with one seed, the best itself.
    """
    means = curve.accuracy[: at + 1]
    return int(np.argmax(means >= means.max() - (curve.half_width or 0.0) - EQUAL))


def factor(mine: Curve, other: Curve, place: int, seed: int = 0) -> Factor:
    """How much less ``mine`` spends than ``other`` for the accuracy that ``other`` has at its point ``place``."""
    costs, spent = np.log(mine.cost), math.log(other.cost[place])
    needed = log_cost_of(costs[None], mine.accuracy[None], other.accuracy[place : place + 1])
    least, most = (math.exp(spent - end) for end in (costs.max(), costs.min()))
    low = high = None
    if mine.freedom and other.freedom:
        generator = np.random.default_rng(seed)
        (my_costs, my_accuracies), (costs_there, accuracies_there) = mine.draws(generator), other.draws(generator)
        found = costs_there[:, place] - log_cost_of(my_costs, my_accuracies, accuracies_there[:, place])
        # Order statistics: infinite ones cannot be averaged.
        ends = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
        low, high = (float(np.exp(end)) for end in ends)
    return Factor(float(np.exp(spent - needed[0])), low, high, least, most)
