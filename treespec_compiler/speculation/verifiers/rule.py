"""What every stochastic verifier is given, and what it must say about itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

from ..proposal import Proposal
from ..sampling.chance import Chance, Row
from ..sampling.samplers import Kind
from .greedy import Verdict

Target: TypeAlias = Callable[[int], Row]
"""Node -> the target's processed distribution after the path to it [V], computed when asked for."""


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
    def samplers(self) -> tuple[Kind, ...]:
        """Child samplers it is lossless with, the best first."""
        ...

    def verify(self, proposal: Proposal, target: Target, chance: Chance) -> Verdict:
        """Judge the proposal, whose node 0 is its only root."""
        ...
