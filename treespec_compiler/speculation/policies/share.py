"""One request's part of an engine's budget of nodes."""

from __future__ import annotations

from collections.abc import Sequence

from ..cost.acceptance import RANKS, Acceptance, split
from ..proposal import Proposal
from .auto import KNOWN, Auto
from .fixed import FixedTree
from .protocol import TreePolicy

POOL = 6.0
"""Tries that the acceptance of all requests counts for, beside a request's own."""


class Share:
    """One request's part of the budget. `plan` and `observe` as in `Controller`."""

    def __init__(self, policy: Auto, pools: Sequence[Acceptance]) -> None:
        self.policy, self.pools = policy, pools
        self.own = [Acceptance() for _ in pools]
        self.trees: list[FixedTree | None] = [None] * len(pools)
        self.context = self.given = self.remaining = 0
        """Tokens that are committed, given so far, and still wanted."""
        self.behind = [0] * len(pools)
        """Tokens that each draft has to run before the request's next tree."""

    @property
    def nodes(self) -> int:
        """Of its next tree, the root included."""
        return 1 + sum(tree.max_nodes - 1 for tree in self.trees if tree is not None)

    def plan(self, context: int, remaining: int) -> Sequence[TreePolicy | None]:
        return self.trees

    def observe(
        self, proposal: Proposal, path: Sequence[int], tokens: int, verify: float, draft: float, rest: float
    ) -> None:
        active = [i for i, tree in enumerate(self.trees) if tree is not None]
        if not active:
            return
        parts = split(proposal, path)
        if len(parts) == len(active):
            for i, (part, nodes) in zip(active, parts, strict=True):
                self.own[i].observe(part, nodes)
                self.pools[i].observe(part, nodes)

    def rates(self, draft: int, fresh: bool) -> list[float]:
        """The chance that the child of each rank is accepted, given that its parent was; falling with the rank.

        `fresh`: as if next to nothing had been seen.
        """
        pool, own = self.pools[draft], self.own[draft]
        prior = Acceptance().rates() if fresh else pool.rates()
        weight = POOL if pool.tried[0] >= KNOWN and not fresh else 1.0
        seen = 1.0 / max(1.0, own.tried[0]) if fresh else 1.0
        found: list[float] = []
        for rank in range(RANKS):
            rate = (own.accepted[rank] * seen + prior[rank] * weight) / (own.tried[rank] * seen + weight)
            found.append(min([rate, 1.0 - sum(found), *found[-1:]]))
        return found

    def known(self, draft: int) -> bool:
        return self.pools[draft].tried[0] + self.own[draft].tried[0] >= KNOWN
