"""Sequoia: the tree of largest expected acceptance for every node budget, and the budget that is fastest.

Sequoia (Chen et al., arXiv 2402.12374v3, section 3): let a[k] be the chance that the k-th child of an accepted node is
accepted (and none of those before it), whatever its place. A tree then yields the sum over its nodes of the product of
a on each path. Where a falls with k, as it is made to here, the best trees are grown greedily instead of by the paper's
dynamic programme; its hardware-aware optimizer takes the size and depth that are fastest by *measured* times.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .fixed import FixedTree

PATIENCE = 3
"""Depths in a row without gain after which no deeper tree is tried."""


@dataclass(frozen=True)
class Planned:
    """A tree, what a step with it is expected to yield and to take."""

    tree: FixedTree
    tokens: float
    """Expected tokens of a step, the bonus token included."""
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def greedy_nodes(acceptance: Sequence[float], nodes: int, depth: int) -> list[tuple[int, int, int, float]]:
    """The best trees where `acceptance` falls with the rank, in time n log n: (parent, rank, depth, value) of each node
    after the root, best first, so that the first n - 1 of them are the best tree of n nodes.

    No node is worth more than its parent or than its sibling of lower rank, so the n largest values always form a tree.
    """
    found: list[tuple[int, int, int, float]] = []
    heap = [(-acceptance[0], 1, 0, 0)] if depth > 0 else []  # (-value, depth, parent, rank)
    while heap and len(found) < nodes - 1:
        negative, level, parent, rank = heapq.heappop(heap)
        found.append((parent, rank, level, -negative))
        if level < depth:
            heapq.heappush(heap, (negative * acceptance[0], level + 1, len(found), 0))
        if rank + 1 < len(acceptance) and acceptance[rank] > 0:
            heapq.heappush(heap, (negative * acceptance[rank + 1] / acceptance[rank], level, parent, rank + 1))
    return found


def fastest_tree(
    acceptance: Sequence[float],
    step_seconds: Callable[[int, Sequence[int]], float],
    nodes: int,
    depth: int,
) -> Planned:
    """Over all depths up to `depth` and sizes up to `nodes`: the tree of most expected tokens a second.

    `step_seconds(size, rows)`: what a step with `size` verified nodes takes when the draft's calls run `rows[i]` nodes.
    """
    monotone = [min(acceptance[: k + 1]) for k in range(len(acceptance))]
    worse = 0  # depths in a row that were no faster
    best = Planned(FixedTree((-1,), "plain"), 1.0, step_seconds(1, ()))
    chosen: list[tuple[int, int, int, float]] = []
    for levels in range(1, depth + 1):
        order = greedy_nodes(monotone, nodes, levels)
        rows, tokens, before = [1] + [0] * levels, 1.0, best.rate
        for size, (_, _, level, value) in enumerate(order, 2):
            rows[level] += 1
            tokens += value
            if rows[levels] == 0:
                continue  # a tree of fewer levels, seen already
            seconds = step_seconds(size, rows[:levels])
            if tokens / seconds > best.rate:
                chosen = order[: size - 1]
                best = Planned(best.tree, tokens, seconds)
        worse = 0 if best.rate > before else worse + 1
        if worse == PATIENCE:
            break
    if not chosen:
        return best
    tree = FixedTree.of([(parent, rank) for parent, rank, _, _ in chosen])
    return Planned(tree, best.tokens, best.seconds)
