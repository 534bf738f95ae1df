"""Recursive rejection sampling without replacement, Sequoia's verification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.acceptance import Target
from ..proposal import Proposal
from ..sampling.chance import Chance
from ..sampling.samplers import SamplerKind
from .greedy import Verdict
from .multi_step import rejection_walk


@dataclass(frozen=True)
class RecursiveRejection:
    """As multi-step sampling, but a rejected x changes both sides: p <- norm(max(0, p - q)), then q <- q without x.

    Sequoia (arXiv 2402.12374v3, section 3), "Sequoia Sampling and Verification"; the same rule is recursive rejection
    sampling without replacement in arXiv 2402.14160. Children must have been drawn without replacement: then the
    renormalised q is what the next one was drawn from. Where q runs out of tokens there are no further children;
    Sequoia goes on with uniform ones.
    """

    name: ClassVar[str] = "recursive"
    needs_q: ClassVar[bool] = True
    samplers: ClassVar[tuple[SamplerKind, ...]] = ("without-replacement",)

    def verify(self, proposal: Proposal, target: Target, chance: Chance) -> Verdict:
        return rejection_walk(proposal, target, chance, replacement=False)
