"""Best-first trees: the nodes that the draft itself thinks likeliest, wherever they hang."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import InvalidOption
from ..proposal import Proposal


@dataclass(frozen=True)
class BestFirst:
    """EAGLE-2 (arXiv 2406.16858, section 4): expand, then rerank under a node budget.

    A node's value is the product of the draft's probabilities on its path, an estimate of its acceptance. Each level
    runs the `beam` newest nodes of largest value and gives each `beam` children; of all nodes, the `nodes` of largest
    value are verified (ties go to the shallower node, so that the result is a tree). With `stop` above 0, nodes of
    less value are neither run nor verified: the tree shrinks where the draft is unsure.

    The choice looks at the drawn tokens, so it is lossless with deterministic top-k children only.
    """

    nodes: int = 12
    """Of the verified tree, the root included."""
    depth: int = 4
    beam: int = 3
    stop: float = 0.0

    def __post_init__(self) -> None:
        check_counts(self, "nodes", "depth", "beam")
        if not 0.0 <= self.stop < 1.0:
            raise InvalidOption(name="stop", got=self.stop, expected="a probability below 1")

    @property
    def max_nodes(self) -> int:
        return max(self.nodes, 1 + self.beam * (self.depth - 1))  # verified, or run by the draft

    @property
    def max_depth(self) -> int:
        return self.depth

    @property
    def needs_q(self) -> bool:
        return True

    def widths(self, depth: int, proposal: Proposal) -> Sequence[int]:
        """For drafts that cannot choose what to run: the same beam, as widths of the newest level."""
        newest = [node for node, d in enumerate(proposal.depths) if d == depth]
        wanted = dict(self.expand(depth, proposal, values(proposal)))
        return [wanted.get(node, 0) for node in newest]

    def expand(self, depth: int, proposal: Proposal, value: Sequence[float]) -> list[tuple[int, int]]:
        """Nodes to run next and how many children each gets."""
        if depth >= self.depth:
            return []
        newest = [node for node, d in enumerate(proposal.depths) if d == depth and value[node] > self.stop]
        best = heapq.nlargest(self.beam, newest, key=value.__getitem__)
        return [(node, self.beam) for node in sorted(best)]

    def select(self, proposal: Proposal, value: Sequence[float]) -> list[int]:
        """Nodes to verify, in index order."""
        return likeliest_nodes(value, self.nodes, self.stop)


def likeliest_nodes(value: Sequence[float], count: int, stop: float = 0.0) -> list[int]:
    """The `count` nodes of largest value and above `stop`; parents come with their children, the root always."""
    # NOTE a child's value is at most its parent's and its index is larger, so a stable order keeps trees whole.
    best = heapq.nlargest(count - 1, range(1, len(value)), key=lambda node: (value[node], -node))
    return [0, *sorted(node for node in best if value[node] > stop)]


def values(proposal: Proposal) -> list[float]:
    """Of each node, the product of q on its path."""
    assert proposal.q is not None, "the policy reads q: `needs_q` must be true"
    value: list[float] = []
    for parent, q in zip(proposal.parents, proposal.q, strict=True):
        value.append(q * value[parent] if parent >= 0 else 1.0)
    return value


def check_counts(policy: object, *names: str) -> None:
    for name in names:
        got = getattr(policy, name)
        if not isinstance(got, int) or isinstance(got, bool) or got < 1:
            raise InvalidOption(name=f"{type(policy).__name__}.{name}", got=got, expected="a positive integer")
