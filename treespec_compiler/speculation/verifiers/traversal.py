"""Traversal verification: from the leaves to the root."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..proposal import Draws, Proposal
from ..sampling.chance import Chance, Row
from ..sampling.samplers import Kind
from .greedy import Verdict
from .rule import Target, ratio


@dataclass(frozen=True)
class TraversalVerification:
    """Accept the first node, leaves before their parents, that passes with its *sequence's* probability.

    Traversal Verification (arXiv 2505.12398): leaves are tried first, in the order drawn; a rejected leaf is deleted,
    which changes its parent's probability and target, and the walk goes on with the parent's next child or, when none
    is left, with the parent. With w(root) = 1 and, at a node with weight w, target p and the next draw from q,

        w(x) = min(1, w p(x) / q(x))                           for the drawn child x
        p <- norm(max(0, w p - q)),  w <- R / (R + 1 - w),  R = sum(max(0, w p - q))     once x's subtree was rejected.

    Why it is lossless, for draws with and without replacement (the next q is then renormalised): docs/verification.md.
    On a chain it is block verification, on a tree of depth 1 multi-step or recursive rejection sampling.
    """

    name: ClassVar[str] = "traversal"
    needs_q: ClassVar[bool] = True
    samplers: ClassVar[tuple[Kind, ...]] = ("without-replacement", "iid")

    def verify(self, proposal: Proposal, target: Target, chance: Chance) -> Verdict:
        drawn = proposal.drawn()

        def visit_of(node: int, weight: float) -> _Visit:
            return _Visit(node, weight, lambda: target(node), drawn.get(node, ()), proposal.tokens)

        visits = [visit_of(0, 1.0)]
        while True:
            visit = visits[-1]
            child, weight = visit.next_child()
            if child is not None:
                if weight > 0.0:
                    visits.append(visit_of(child, weight))
                else:
                    visit.reject_child()
            elif len(visits) == 1 or chance.accept(visit.weight):
                return Verdict([v.node for v in visits], chance.choose(visit.distribution()))
            else:
                visits.pop()
                visits[-1].reject_child()


class _Visit:
    """A node on the way: its weight, its target and the draws below it that were not tried yet."""

    def __init__(
        self, node: int, weight: float, target: Callable[[], Row], drawn: Sequence[Draws], tokens: Sequence[int]
    ) -> None:
        self.node, self.weight = node, weight
        self._target, self._drawn, self._tokens = target, drawn, tokens
        self._p: Row | None = None
        self._q: Row | None = None
        self._untried = self._in_order()

    def distribution(self) -> Row:
        """What is still owed after this node [V]."""
        if self._p is None:
            self._p = self._target()
        return self._p

    def next_child(self) -> tuple[int | None, float]:
        """The next drawn child and its weight, or None after the last."""
        for child, q in self._untried:
            self._q = q
            token = self._tokens[child]
            return child, ratio(self.weight * float(self.distribution()[token]), float(q[token]))
        return None, 0.0

    def reject_child(self) -> None:
        """Nothing of the subtree of the last child was accepted."""
        assert self._q is not None
        rest = np.maximum(self.weight * self.distribution() - self._q, 0.0)
        total = float(rest.sum())
        rejected = total + 1.0 - self.weight  # how likely that was
        # NOTE: 0 means that a draw from p = q was rejected, which only rounding can do.
        if rejected > 0.0:
            self.weight = min(1.0, total / rejected)
        if total > 0.0:
            self._p = rest / total

    def _in_order(self) -> Iterator[tuple[int, Row]]:
        for draws in self._drawn:
            yield from draws.in_order(self._tokens, len(self.distribution()), draws.replacement)
