"""Which nodes of a verified tree are accepted: each rule once, on rows of numpy and of torch alike.

The references of `treespec::greedy_accept` and `treespec::stochastic_accept` and the verifiers of `speculation` call
these. The rules' sources are named there: `speculation.verifiers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

AnyRow: TypeAlias = Any
"""One float64 number for every id [V]: a numpy array or a tensor. What the rules do to it: index one, `*` and `/` by a
number, `-`, `clip(min=0.0)`, `sum()`."""
Target: TypeAlias = Callable[[int], AnyRow]
"""Node -> the target's distribution after the path to it; asked for when it is needed, once a visit."""
DrawsBelow: TypeAlias = Callable[[int], Iterable[tuple[int, AnyRow | None]]]
"""Node -> each draw below it, in the order drawn: the child, and the distribution it was drawn from given those before;
None: it was chosen without chance, a draw from what has probability 1 for its token."""
Accepted: TypeAlias = tuple[list[int], int]
"""The path, root first, and the target's token after it."""


class Randomness(Protocol):
    """Every question takes the next random number, also where the answer is certain."""

    def accept(self, probability: float) -> bool: ...

    def choose(self, weights: AnyRow) -> int: ...


def follow(
    tokens: Sequence[int], parents: Sequence[int], path: list[int], want: int, after: Callable[[int], int]
) -> Accepted:
    """Go on from `path` to the child that has the wanted token, while there is one; `after(node)` is wanted then.

    Children follow their parents, so one walk over the nodes finds the whole path.
    """
    last = path[-1] if path else -1
    for node in range(len(path), len(tokens)):
        if parents[node] == last and tokens[node] == want:
            path.append(node)
            last, want = node, after(node)
    return path, want


def naive(tokens: Sequence[int], parents: Sequence[int], target: Target, chance: Randomness) -> Accepted:
    """A token is drawn from p; the walk goes on where a child has it."""

    def draw(node: int) -> int:
        return chance.choose(target(node))

    return follow(tokens, parents, [0], draw(0), draw)


def rejection(tokens: Sequence[int], target: Target, drawn: DrawsBelow, chance: Randomness) -> Accepted:
    """Multi-step and recursive, which differ in `drawn`: x is accepted with min(1, p(x) / q(x)), else p is what is left
    of it. After the last rejection the walk ends."""
    path = [0]
    while True:
        p = target(path[-1])
        for child, q in drawn(path[-1]):
            token = tokens[child]
            if chance.accept(ratio(float(p[token]), _chance_of(q, token))):
                path.append(child)
                break
            rest, total = _residual(p, q, token)
            # NOTE: p <= q everywhere means p = q: rejection had probability 0, and only rounding can have led here.
            p = rest / total if total > 0.0 else p
        else:
            return path, chance.choose(p)


def traversal(tokens: Sequence[int], target: Target, drawn: DrawsBelow, chance: Randomness) -> Accepted:
    """Leaves before their parents, each node accepted with its weight."""
    visits = [_Visit(0, 1.0, target, drawn)]
    while True:
        visit = visits[-1]
        child, weight = visit.next_child(tokens)
        if child is not None:
            if weight > 0.0:
                visits.append(_Visit(child, weight, target, drawn))
            else:
                visit.reject_child()
        elif len(visits) == 1 or chance.accept(visit.weight):
            return [v.node for v in visits], chance.choose(visit.owed)
        else:
            visits.pop()
            visits[-1].reject_child()


class _Visit:
    """A node on the way: its weight, what is still owed after it, and the draws below it that were not tried yet."""

    def __init__(self, node: int, weight: float, target: Target, drawn: DrawsBelow) -> None:
        self.node, self.weight = node, weight
        self._target: Target = target
        self._owed: AnyRow = None
        self._last: tuple[AnyRow | None, int] = None, 0
        self._untried = iter(drawn(node))

    @property
    def owed(self) -> AnyRow:
        if self._owed is None:
            self._owed = self._target(self.node)
        return self._owed

    def next_child(self, tokens: Sequence[int]) -> tuple[int | None, float]:
        """The next drawn child and its weight, or None after the last."""
        for child, q in self._untried:
            token = tokens[child]
            self._last = q, token
            return child, ratio(self.weight * float(self.owed[token]), _chance_of(q, token))
        return None, 0.0

    def reject_child(self) -> None:
        """Nothing of the subtree of the last child was accepted."""
        rest, total = _residual(self.owed, *self._last, self.weight)
        rejected = total + 1.0 - self.weight  # how likely that was
        # NOTE: 0 means that a draw from p = q was rejected, which only rounding can do.
        if rejected > 0.0:
            self.weight = min(1.0, total / rejected)
        if total > 0.0:
            self._owed = rest / total


def in_order(
    children: Iterable[int], tokens: Sequence[int], q: AnyRow | None, replacement: bool
) -> Iterator[tuple[int, AnyRow | None]]:
    """Draws from q in the order drawn, as `DrawsBelow` tells them. Without replacement a drawn token leaves q."""
    for child in children:
        yield child, q
        if not replacement and q is not None:
            left = q * 1.0  # a copy
            left[tokens[child]] = 0.0
            total = float(left.sum())
            q = left / total if total > 0.0 else left


def ratio(p: float, q: float) -> float:
    """min(1, p / q); q = 0 is reached only by draws that are not what the rule assumes."""
    if p <= 0.0:
        return 0.0
    return 1.0 if p >= q else p / q


def _chance_of(q: AnyRow | None, token: int) -> float:
    return 1.0 if q is None else float(q[token])


def _residual(p: AnyRow, q: AnyRow | None, token: int, weight: float = 1.0) -> tuple[AnyRow, float]:
    """max(0, weight p - q), what is still owed after the draw of `token` from q was rejected, and its sum."""
    rest = p * weight
    if q is None:
        rest[token] = 0.0
    else:
        rest = (rest - q).clip(min=0.0)
    return rest, float(rest.sum())
