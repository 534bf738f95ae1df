"""Block verification: a chain is judged as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...errors import InvalidTree
from ...ir.acceptance import Target, ratio
from ..proposal import Proposal
from ..sampling.chance import Chance, Row
from ..sampling.samplers import SamplerKind
from .greedy import Verdict


@dataclass(frozen=True)
class BlockVerification:
    """Accept the longest beginning of a chain that passes its own test; never fewer tokens than token by token.

    Block Verification (arXiv 2403.10444), Algorithm 2, with the paper's p_i as `weight`:

        p_0 = 1,  p_i = min(1, p_(i-1) Mb(x_i) / Ms(x_i))
        h_i = R / (R + 1 - p_i),  R = sum(max(0, p_i Mb(. | x_1..x_i) - Ms(. | x_1..x_i)));  h_gamma = p_gamma
        tau = the last i with eta_i <= h_i;  bonus from norm(max(0, p_tau Mb - Ms)), or from Mb if tau = gamma.

    The tests are independent, so they are made from the end and the first to pass is the last that passes.
    """

    name: ClassVar[str] = "block"
    needs_q: ClassVar[bool] = True
    samplers: ClassVar[tuple[SamplerKind, ...]] = ("iid", "without-replacement")

    def verify(self, proposal: Proposal, target: Target, chance: Chance) -> Verdict:
        ps, weights = [target(0)], [1.0]
        chain, qs = _chain(proposal, len(ps[0]))
        for node, q in zip(chain[1:], qs, strict=True):
            token = proposal.tokens[node]
            weights.append(ratio(weights[-1] * float(ps[-1][token]), float(q[token])))
            ps.append(target(node))
        last = len(qs)
        if chance.accept(weights[last]):
            return Verdict(chain, chance.choose(ps[last]))
        for tau in range(last - 1, -1, -1):
            rest = np.maximum(weights[tau] * ps[tau] - qs[tau], 0.0)
            total = float(rest.sum())
            missing = 1.0 - weights[tau]
            # NOTE: both are 0 only for p = q and weight 1, where the next node passes with certainty.
            if tau == 0 or chance.accept(total / (total + missing) if total + missing > 0.0 else 1.0):
                return Verdict(chain[: tau + 1], chance.choose(rest if total > 0.0 else ps[tau]))
        raise AssertionError("the root always passes")


def _chain(proposal: Proposal, vocab_size: int) -> tuple[list[int], list[Row]]:
    """The nodes from the root to the leaf and, for all but the root, the distribution each was drawn from."""
    drawn = proposal.drawn()
    chain: list[int] = [0]
    qs: list[Row] = []
    while chain[-1] in drawn:
        draws = drawn[chain[-1]]
        if len(draws) != 1 or len(draws[0].children) != 1:
            raise InvalidTree(
                got=f"{sum(len(d.children) for d in draws)} draws below node {chain[-1]}",
                expected="a chain, one draw a node, for block verification",
                fix="Traversal verification is the same rule for trees: verifier='traversal'.",
            )
        ((child, q),) = draws[0].in_order(proposal.tokens, True)
        chain.append(child)
        qs.append(_one_hot(proposal.tokens[child], vocab_size) if q is None else q)
    return chain, qs


def _one_hot(token: int, vocab_size: int) -> Row:
    row = np.zeros(vocab_size)
    row[token] = 1.0
    return row
