"""Where randomness comes from. Samplers and verifiers ask a `Chance`, so that tests can take every branch instead."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Row: TypeAlias = NDArray[np.float64]
"""One number for every id of the vocabulary [V]."""


# Of 4096 weights, 3 are drawn in 13 us, by a race alone in 41: few repeats are cheaper than a number for every index.
REPEATS = 8


class Chance(Protocol):
    def accept(self, probability: float) -> bool:
        """True with this probability; certain below 0 and from 1 on."""
        ...

    def choose(self, weights: Row) -> int:
        """An index, with probability proportional to its weight."""
        ...

    def repeated(self, weights: Row, count: int) -> list[int]:
        """`count` independent choices."""
        ...

    def distinct(self, weights: Row, count: int) -> list[int]:
        """Choices one after the other, each among the indices not yet chosen; fewer where weights run out."""
        ...


class SeededChance:
    """Pseudo-random numbers; the same seed gives the same choices."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def accept(self, probability: float) -> bool:
        if probability >= 1.0:
            return True
        return probability > 0.0 and self._generator.random() < probability

    def choose(self, weights: Row) -> int:
        cumulative = weights.cumsum()
        return int(cumulative.searchsorted(self._generator.random() * cumulative[-1], side="right"))

    def repeated(self, weights: Row, count: int) -> list[int]:
        cumulative = weights.cumsum()
        numbers = self._generator.random(count) * cumulative[-1]
        found: list[int] = cumulative.searchsorted(numbers, side="right").tolist()
        return found

    def distinct(self, weights: Row, count: int) -> list[int]:
        """Draws from all of `weights` without the repeats: the next new index has the law of a choice among the rest,
        however many repeats came before it. Where too many do, the rest is drawn by a race."""
        cumulative = weights.cumsum()
        numbers = self._generator.random(count + REPEATS) * cumulative[-1]
        found: list[int] = []
        for index in cumulative.searchsorted(numbers, side="right").tolist():
            if index not in found:
                found.append(index)
                if len(found) == count:
                    return found
        rest = weights.copy()
        rest[found] = 0.0
        return found + self._race(rest, count - len(found))

    def _race(self, weights: Row, count: int) -> list[int]:
        """Gumbel top-k (Kool et al., arXiv 1903.06059): the largest log w + G have the law of successive choices.

        Computed in its exponential form: -log of exp(-G) is E ~ Exp(1), so the smallest E / w are wanted, in order.
        """
        support = weights.nonzero()[0]
        with np.errstate(over="ignore"):
            arrival = self._generator.standard_exponential(len(support)) / weights[support]
        if count < len(support):
            first = arrival.argpartition(count - 1)[:count]
            support, arrival = support[first], arrival[first]
        found: list[int] = support[arrival.argsort()].tolist()
        return found
