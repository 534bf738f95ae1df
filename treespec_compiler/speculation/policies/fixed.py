"""A tree of a fixed, uneven shape: every node says how many children it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ...errors import InvalidOption
from ..proposal import Proposal


@dataclass(frozen=True)
class FixedTree:
    """The shape given by `parents`, level by level (node 0 is the root); siblings are the likeliest tokens in order."""

    parents: tuple[int, ...]
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        parents = self.parents
        depths = _depths(parents) if parents and parents[0] == -1 else []
        if not depths or depths != sorted(depths) or list(parents) != sorted(parents):
            expected = "one root (-1) first, and the nodes of each level in their parents' order"
            raise InvalidOption(name="FixedTree.parents", got=parents, expected=expected)

    @classmethod
    def of(cls, children: Sequence[tuple[int, int]], name: str = "") -> FixedTree:
        """From nodes in any order as (parent, rank), the root not among them; entry i is node i + 1."""
        below: dict[int, list[tuple[int, int]]] = {}
        for i, (parent, rank) in enumerate(children):
            below.setdefault(parent, []).append((rank, i + 1))
        parents, level = [-1], [(0, 0)]  # (node here, node given)
        while level:
            following = []
            for here, given in level:
                for _, child in sorted(below.get(given, ())):
                    parents.append(here)
                    following.append((len(parents) - 1, child))
            level = following
        return cls(tuple(parents), name)

    @classmethod
    def chain(cls, depth: int) -> FixedTree:
        return cls(tuple(range(-1, depth)))

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Children of each node, level by level."""
        counts = [0] * len(self.parents)
        for parent in self.parents[1:]:
            counts[parent] += 1
        depths = _depths(self.parents)
        levels: list[list[int]] = [[] for _ in range(depths[-1] + 1)]
        for count, depth in zip(counts, depths, strict=True):
            levels[depth].append(count)
        return tuple(map(tuple, levels))

    @property
    def max_nodes(self) -> int:
        return len(self.parents)

    @property
    def max_depth(self) -> int:
        return len(self.levels) - 1

    @property
    def needs_q(self) -> bool:
        return False

    def widths(self, depth: int, proposal: Proposal) -> int | Sequence[int]:
        if depth >= len(self.levels) - 1:
            return 0
        level = self.levels[depth]
        if len(level) == 1:
            return level[0]
        first = self._firsts[depth]
        if len(proposal.tokens) == first + len(level):
            return level
        # Limits cut the tree, or a proposer had fewer: find the nodes by the ranks on their paths.
        return [self._by_ranks.get(_ranks(proposal, node), 0) for node, d in enumerate(proposal.depths) if d == depth]

    @cached_property
    def _firsts(self) -> tuple[int, ...]:
        """Node that each level begins with."""
        firsts, count = [], 0
        for level in self.levels:
            firsts.append(count)
            count += len(level)
        return tuple(firsts)

    @cached_property
    def _by_ranks(self) -> dict[tuple[int, ...], int]:
        counts = [count for level in self.levels for count in level]
        seen: dict[int, int] = {}
        paths: list[tuple[int, ...]] = []
        for parent in self.parents:
            rank = seen.get(parent, 0)
            seen[parent] = rank + 1
            paths.append((*paths[parent], rank) if parent >= 0 else ())
        return dict(zip(paths, counts, strict=True))

    def __str__(self) -> str:
        return self.name or f"tree of {self.max_nodes} nodes, {self.max_depth} levels"


def _depths(parents: Sequence[int]) -> list[int]:
    depths: list[int] = []
    for node, parent in enumerate(parents):
        if not -1 <= parent < node or (parent < 0) != (node == 0):
            return []
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return depths


def _ranks(proposal: Proposal, node: int) -> tuple[int, ...]:
    ranks: list[int] = []
    while proposal.parents[node] >= 0:
        ranks.append(proposal.ranks[node])
        node = proposal.parents[node]
    return tuple(reversed(ranks))
