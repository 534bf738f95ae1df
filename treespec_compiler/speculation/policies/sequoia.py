"""Sequoia: the tree of largest expected acceptance for every node budget, and the budget that is fastest.

Sequoia (Chen et al., arXiv 2402.12374v3, section 3): let a[k] be the chance that the k-th child of an accepted node is
accepted (and none of those before it), whatever its place. A tree then yields the sum over its nodes of the product of
a on each path, and the best tree is found by dynamic programming; its hardware-aware optimizer takes the size and depth
that are fastest by *measured* times.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

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


def sequoia_trees(acceptance: Sequence[float], nodes: int, depth: int) -> list[tuple[FixedTree, float]]:
    """The best tree of 1, 2, ..., `nodes` nodes (root included) and at most `depth` levels below the root, and its
    expected tokens a step. The paper's dynamic programme: T(n, d) = 1 + the best split of n - 1 nodes among the
    children, where a child of rank k with m nodes is worth a[k] * T(m, d - 1).
    """
    ranks = len(acceptance)

    @cache
    def whole(n: int, d: int) -> float:
        return 1.0 + children(n - 1, d, 0)[0]

    @cache
    def children(n: int, d: int, rank: int) -> tuple[float, int]:
        """Best value of n nodes below children rank, rank + 1, ... and the size of the first; no gaps among ranks."""
        if n == 0 or d == 0 or rank == ranks:
            return (0.0, 0) if n == 0 else (float("-inf"), 0)
        best = (float("-inf"), 0)
        for size in range(n, 0, -1):
            value = acceptance[rank] * whole(size, d - 1) + children(n - size, d, rank + 1)[0]
            if value > best[0]:
                best = (value, size)
        return best

    def build(n: int, d: int, node: int, out: list[tuple[int, int]]) -> None:
        rank, left = 0, n - 1
        while left:
            size = children(left, d, rank)[1]
            out.append((node, rank))
            build(size, d - 1, len(out), out)
            rank, left = rank + 1, left - size

    found = []
    for n in range(1, nodes + 1):
        value = whole(n, depth)
        if value == float("-inf"):
            break  # no room for more nodes in this depth
        out: list[tuple[int, int]] = []
        build(n, depth, 0, out)
        found.append((FixedTree.of(out, f"sequoia-{n}"), value))
    return found


def greedy_nodes(acceptance: Sequence[float], nodes: int, depth: int) -> list[tuple[int, int, int, float]]:
    """The same trees in time n log n where `acceptance` falls with the rank: (parent, rank, depth, value) of each node
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
