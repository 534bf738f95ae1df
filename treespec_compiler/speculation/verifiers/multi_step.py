"""SpecInfer's multi-step speculative sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..proposal import Proposal
from ..sampling.chance import Chance
from ..sampling.samplers import Kind
from .greedy import Verdict
from .rule import Target, ratio, residual


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
    samplers: ClassVar[tuple[Kind, ...]] = ("iid",)

    def verify(self, proposal: Proposal, target: Target, chance: Chance) -> Verdict:
        return rejection_walk(proposal, target, chance, replacement=True)


def rejection_walk(proposal: Proposal, target: Target, chance: Chance, *, replacement: bool) -> Verdict:
    """From the root down; `replacement` says whether a node's later draws could repeat its earlier ones."""
    tokens, drawn = proposal.tokens, proposal.drawn()
    path, node = [0], 0
    while True:
        p = target(node)
        accepted = -1
        for draws in drawn.get(node, ()):
            for child, q in draws.in_order(tokens, len(p), replacement):
                token = tokens[child]
                if chance.accept(ratio(p[token], q[token])):
                    accepted = child
                    break
                p = residual(p, q)
            if accepted >= 0:
                break
        if accepted < 0:
            return Verdict(path, chance.choose(p))
        path.append(accepted)
        node = accepted
