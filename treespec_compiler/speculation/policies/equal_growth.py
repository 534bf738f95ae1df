"""Equal growth: every level of drafting adds the same number of nodes, wherever they are worth most."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from ..proposal import Proposal
from .best_first import check_counts, likeliest_nodes, values


@dataclass(frozen=True)
class EqualGrowth:
    """The equal-growth tree of Yggdrasil (arXiv 2512.23858).

    Each step runs the `width` nodes of largest value (the product of the draft's probabilities on the path) among all
    that were not run yet, at whatever depth, so each draft call has the same shape; after `steps` of them the
    `1 + width * steps` nodes of largest value are verified. The shape of the tree follows the context, the sizes of all
    calls are fixed.

    The choice looks at the drawn tokens, so it is lossless with deterministic top-k children only.
    """

    width: int = 2
    steps: int = 4

    def __post_init__(self) -> None:
        check_counts(self, "width", "steps")

    @property
    def max_nodes(self) -> int:
        return 1 + self.width * self.steps

    @property
    def max_depth(self) -> int:
        return self.steps

    @property
    def needs_q(self) -> bool:
        return True

    def widths(self, depth: int, proposal: Proposal) -> Sequence[int]:
        """For drafts that cannot choose what to run: the likeliest `width` nodes of the newest level."""
        newest = [node for node, d in enumerate(proposal.depths) if d == depth]
        if depth >= self.steps:
            return []
        value = values(proposal)
        best = set(heapq.nlargest(self.width, newest, key=value.__getitem__))
        return [self.width if node in best else 0 for node in newest]

    def expand(self, depth: int, proposal: Proposal, value: Sequence[float]) -> list[tuple[int, int]]:
        """Nodes to run next and how many children each gets; `depth` counts the steps."""
        if depth >= self.steps:
            return []
        run = set(proposal.parents)
        leaves = [node for node in range(len(proposal.tokens)) if node not in run]
        best = heapq.nlargest(self.width, leaves, key=lambda node: (value[node], -node))
        return [(node, self.width) for node in sorted(best)]

    def select(self, proposal: Proposal, value: Sequence[float]) -> list[int]:
        """Nodes to verify, in index order."""
        return likeliest_nodes(value, self.max_nodes)
