"""Sequoia's trees by the paper's dynamic programme: what the greedy growth of the package is held against."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from treespec_compiler.speculation.policies.fixed import FixedTree


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
