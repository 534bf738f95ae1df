"""Naive sampling: the target's own samples, followed as long as the tree holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.acceptance import Target, naive
from ..proposal import Proposal
from ..sampling.chance import Chance
from ..sampling.samplers import SamplerKind
from .greedy import Verdict


@dataclass(frozen=True)
class NaiveSampling:
    """Sample from the target at each node; go to the child with that token while there is one.

    SpecInfer (arXiv 2305.09781), section 4.3, "naive sampling", the baseline of Theorem 4.3 and of Table 3. The rule
    of the other verifiers with q = 1. Lossless with any children, as they have no influence on what is sampled.
    """

    name: ClassVar[str] = "naive"
    needs_q: ClassVar[bool] = False
    samplers: ClassVar[tuple[SamplerKind, ...]] = ("top-k", "without-replacement", "iid")

    def verify(self, proposal: Proposal, target: Target, chance: Chance) -> Verdict:
        return Verdict(*naive(proposal.tokens, proposal.parents, target, chance))
