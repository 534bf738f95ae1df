"""How often a draft's children were accepted, by rank; remembered as long as both models live."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..policies.fixed import FixedTree
from ..proposal import Proposal

RANKS = 4
GREEDY = "greedy"
# What is assumed before anything was seen, and for how many tries it counts: optimistic, so that a draft gets its
# chance, and light, so that three misses end it.
PRIOR_BEST = 0.7
PRIOR_REST = 0.35
"""Of what the likelier ranks left."""
PRIOR_TRIES = 1.0
PRIOR_REST_TRIES = 4.0
# Older steps count less: 0.98 a step is a memory of 50 steps.
DECAY = 0.98


@dataclass(slots=True)
class Acceptance:
    """Tries and successes by rank, and what became of the last decision."""

    tried: list[float] = field(default_factory=lambda: [0.0] * RANKS)
    accepted: list[float] = field(default_factory=lambda: [0.0] * RANKS)
    alone: float = 0.0
    """With other drafts: accepted tokens that no other one had, decayed."""
    total: float = 0.0
    patience: int = 0
    """Plain tokens to wait before this draft is tried again; doubles each time it fails."""
    waited: int = 0
    plans: dict[tuple[int, ...], FixedTree] = field(default_factory=dict, repr=False)
    """The fastest tree by rounded rates and circumstances."""

    def rates(self) -> list[float]:
        """The chance that the child of each rank is accepted, given that its parent was."""
        found: list[float] = []
        left = 1.0
        for rank in range(RANKS):
            prior = PRIOR_BEST if rank == 0 else min(left * PRIOR_REST, found[-1] / 2)
            weight = PRIOR_TRIES if rank == 0 else PRIOR_REST_TRIES
            rate = (self.accepted[rank] + prior * weight) / (self.tried[rank] + weight)
            rate = min(rate, left)
            found.append(rate)
            left = max(0.0, left - rate)
        return found

    @property
    def share_alone(self) -> float:
        """Of its accepted tokens, those that no other draft had; 1 where nothing is known."""
        return (self.alone + 1.0) / (self.total + 1.0)

    def observe(self, proposal: Proposal, accepted: set[int]) -> None:
        """Count a step: `accepted` are the proposal's nodes on the path, the root included."""
        count = len(proposal.tokens)
        if count == 1:
            return
        tried, won = self.tried, self.accepted
        for rank in range(RANKS):
            tried[rank] *= DECAY
            won[rank] *= DECAY
        parents, ranks = proposal.parents, proposal.ranks
        for node in range(1, count):
            if parents[node] in accepted and ranks[node] < RANKS:
                tried[ranks[node]] += 1.0
                if node in accepted:
                    won[ranks[node]] += 1.0

    def compare(self, own: int, others: int) -> None:
        """Count a step's accepted tokens: this draft's, and the most that another one had."""
        self.alone = self.alone * DECAY + max(0, own - others)
        self.total = self.total * DECAY + own


_Kinds: TypeAlias = dict[str, Acceptance]
_MEMORY: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, _Kinds]] = weakref.WeakKeyDictionary()


def remembered(target: Any, draft: Any, kind: str = GREEDY) -> Acceptance:
    """The pair's record of one kind of decoding, shared by all requests. Neither model is kept alive by it."""
    kinds = _MEMORY.setdefault(target, weakref.WeakKeyDictionary()).setdefault(draft, {})
    return kinds.setdefault(kind, Acceptance())


def forget(target: Any | None = None) -> None:
    """Drop what is remembered, of one target or of all."""
    if target is None:
        _MEMORY.clear()
    else:
        _MEMORY.pop(target, None)


def split(proposal: Proposal, path: Sequence[int]) -> list[tuple[Proposal, set[int]]]:
    """Each proposer's own proposal and which of its nodes lie on the accepted path."""
    on_path = set(path)
    if not proposal.parts:
        return [(proposal, on_path)]
    return [(part, {node for node, merged in enumerate(nodes) if merged in on_path}) for part, nodes in proposal.parts]
