"""SpecInfer's multi-step speculative sampling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ...ir.acceptance import Target, rejection
from ..proposal import Proposal
from ..sampling.chance import Chance, Row
from ..sampling.samplers import SamplerKind
from .greedy import Verdict


@dataclass(frozen=True)
class MultiStep:
    """Try the drawn children one after the other: accept x with min(1, p(x) / q(x)), else p <- norm(max(0, p - q)).

    SpecInfer (arXiv 2305.09781), Algorithm 2, `VerifyStochastic`, and Theorem 4.2. The walk ends at the first node
    whose children were all rejected, with a token from what is left of p. The paper takes the children in random
    order; draws are exchangeable, so the order drawn is such an order. Children must be independent draws: one that
    was drawn twice is tried twice, and each proposer's draws are divided by its own q.
    """

    name: ClassVar[str] = "multi-step"
    needs_q: ClassVar[bool] = True
    samplers: ClassVar[tuple[SamplerKind, ...]] = ("iid",)

    def verify(self, proposal: Proposal, target: Target, chance: Chance) -> Verdict:
        return rejection_walk(proposal, target, chance, replacement=True)


def rejection_walk(proposal: Proposal, target: Target, chance: Chance, *, replacement: bool) -> Verdict:
    """From the root down; `replacement` says whether a node's later draws could repeat its earlier ones."""
    drawn, tokens = proposal.drawn(), proposal.tokens

    def below(node: int) -> Iterator[tuple[int, Row | None]]:
        for draws in drawn.get(node, ()):
            yield from draws.in_order(tokens, replacement)

    return Verdict(*rejection(tokens, target, below, chance))
