"""What every stochastic verifier is given, and what it must say about itself."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from ...ir.acceptance import Target
from ..proposal import Proposal
from ..sampling.chance import Chance
from ..sampling.samplers import SamplerKind
from .greedy import Verdict


@runtime_checkable
class StochasticVerifier(Protocol):
    """Accepts nodes so that output tokens have the target's distribution, whatever the draft's is."""

    @property
    def name(self) -> str: ...

    @property
    def needs_q(self) -> bool:
        """Whether `verify` reads `proposal.draws`."""
        ...

    @property
    def samplers(self) -> tuple[SamplerKind, ...]:
        """Child samplers it is lossless with, the best first."""
        ...

    def verify(self, proposal: Proposal, target: Target, chance: Chance) -> Verdict:
        """Judge the proposal, whose node 0 is its only root."""
        ...
