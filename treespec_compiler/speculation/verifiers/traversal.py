"""Traversal verification: from the leaves to the root."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ...ir.acceptance import DrawsBelow, Target, traversal
from ..proposal import Proposal
from ..sampling.chance import Chance, Row
from ..sampling.samplers import SamplerKind
from .greedy import Verdict


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
    samplers: ClassVar[tuple[SamplerKind, ...]] = ("without-replacement", "iid")

    def verify(self, proposal: Proposal, target: Target, chance: Chance) -> Verdict:
        return Verdict(*traversal(proposal.tokens, target, draws_of(proposal), chance))


def draws_of(proposal: Proposal) -> DrawsBelow:
    """Each proposer's draws, renormalised where that one drew without replacement."""
    drawn, tokens = proposal.drawn(), proposal.tokens

    def below(node: int) -> Iterator[tuple[int, Row | None]]:
        for draws in drawn.get(node, ()):
            yield from draws.in_order(tokens, draws.replacement)

    return below
