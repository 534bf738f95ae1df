"""Where randomness comes from. Samplers and verifiers ask a `Chance`, so that tests can take every branch instead."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Row: TypeAlias = NDArray[np.float64]
"""One number for every id of the vocabulary [V]."""
Mark: TypeAlias = tuple[Any, tuple[float, ...]]
"""A place in a sequence of pseudo-random numbers."""


# Of 4096 weights, 3 are drawn in 13 us, by a race alone in 41: few repeats are cheaper than a number for every index.
REPEATS = 8


class Chance(Protocol):
    def accept(self, probability: float) -> bool:
        """True with this probability; certain at 0 and below, and from 1 on."""
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
    """Pseudo-random numbers; the same seed gives the same choices.

    Every question takes its numbers from one sequence, uniform in [0, 1), whatever they decide. So a device can be
    given the next ones before it is known how many it needs: `peek`, then `skip`.
    """

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._ahead: deque[float] = deque()  # looked at, not yet used

    def peek(self, count: int) -> Row:
        """The next `count` numbers, which stay the next ones."""
        missing = count - len(self._ahead)
        if missing > 0:
            self._ahead.extend(self._generator.random(missing).tolist())
        return np.fromiter(islice(self._ahead, count), np.float64, count)

    def mark(self) -> Mark:
        """Where in the sequence it is, for `back_to`."""
        return self._generator.bit_generator.state, tuple(self._ahead)

    def back_to(self, mark: Mark) -> None:
        """What was asked since `mark` was not asked."""
        self._generator.bit_generator.state, ahead = mark
        self._ahead = deque(ahead)

    def skip(self, count: int) -> None:
        """`count` of the numbers looked at are used."""
        for _ in range(count):
            self._ahead.popleft()

    def _next(self) -> float:
        return self._ahead.popleft() if self._ahead else self._generator.random()

    def _take(self, count: int) -> Row:
        if not self._ahead:
            return self._generator.random(count)
        numbers = self.peek(count)
        self.skip(count)
        return numbers

    def accept(self, probability: float) -> bool:
        return self._next() < probability

    def choose(self, weights: Row) -> int:
        return _indices(weights, np.array([self._next()]))[0]

    def repeated(self, weights: Row, count: int) -> list[int]:
        return _indices(weights, self._take(count))

    def distinct(self, weights: Row, count: int) -> list[int]:
        """Draws from all of `weights` without the repeats: the next new index has the law of a choice among the rest,
        however many repeats came before it. Where too many do, the rest is drawn by a race."""
        found = without_repeats(_indices(weights, self._take(count + REPEATS)), count)
        return found if len(found) == count else self.more_of(weights, found, count)

    def more_of(self, weights: Row, found: list[int], count: int) -> list[int]:
        """`found`, and choices among the other indices up to `count`."""
        rest = weights.copy()
        rest[found] = 0.0
        return found + self._race(rest, count - len(found))

    def _race(self, weights: Row, count: int) -> list[int]:
        """Gumbel top-k (Kool et al., arXiv 1903.06059): the largest log w + G have the law of successive choices.

        Computed in its exponential form: -log of exp(-G) is E ~ Exp(1), so the smallest E / w are wanted, in order.
        """
        support = weights.nonzero()[0]
        with np.errstate(over="ignore"):
            arrival = -np.log1p(-self._take(len(support))) / weights[support]
        if count < len(support):
            first = arrival.argpartition(count - 1)[:count]
            support, arrival = support[first], arrival[first]
        found: list[int] = support[arrival.argsort()].tolist()
        return found


def without_repeats(indices: list[int], count: int) -> list[int]:
    """The first `count` different ones, or as many as there are."""
    return list(dict.fromkeys(indices))[:count]


def _indices(weights: Row, numbers: Row) -> list[int]:
    """For each number in [0, 1), the first index whose cumulative weight is above that share of the whole."""
    cumulative = weights.cumsum()
    found: list[int] = cumulative.searchsorted(numbers * cumulative[-1], side="right").tolist()
    if found and max(found) == len(weights):  # a number so near 1 that the product was rounded up to the whole
        last = int(weights.nonzero()[0][-1])
        found = [min(index, last) for index in found]
    return found
