"""`treespec::stochastic_accept`: which nodes of a verified forest are accepted by chance, given the uniform numbers.

Four rules, those of `speculation.verifiers`; p is the target's distribution after a node, q the draft's.

    naive       a token is drawn from p; the walk goes on where a child has it, and ends with it where none has.
    multi-step  the drawn children are tried in order: x is accepted with min(1, p(x) / q(x)), else
                p <- norm(max(0, p - q)). After the last rejection the walk ends with a token from what is left of p.
    recursive   as multi-step, and a rejected x also leaves q: q <- norm(q without x).
    traversal   leaves before their parents, each node accepted with its weight w: 1 at the root, and below a node
                min(1, w p(x) / q(x)) for a drawn x; once x and all below it were rejected, R = sum(max(0, w p - q)),
                p <- norm(max(0, w p - q)), w <- R / (R + 1 - w), and x leaves q. Every node was drawn once at most.

Every attempt and every draw takes the next number, also where the probability is 0 or 1: a rounding error there cannot
shift the numbers of what follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from .acceptance import in_order, naive, rejection, traversal
from .library import COMPLIANT, define
from .private_torch import OpOverload

SCHEMA = (
    "(Tensor p, Tensor q, Tensor tokens, Tensor parents, Tensor node_offsets, Tensor draw_offsets, Tensor draw_rows, "
    "Tensor draw_q, Tensor uniforms, str rule, int levels) -> Tensor"
)

RULES = ("naive", "multi-step", "recursive", "traversal")
FIELDS = 3
"""Integers of a request before the paths: accepted nodes, the token after them, uniform numbers used."""


def reference(
    p: Tensor,  # [N, V] float64, rows sum to 1
    q: Tensor,  # [G, V] float64, rows sum to 1
    tokens: Tensor,  # [N] int64
    parents: Tensor,  # [N] int64, within the request; its first node is its only root
    node_offsets: Tensor,  # [R + 1] int64
    draw_offsets: Tensor,  # [N + 1] int64: draws draw_offsets[i]:draw_offsets[i + 1] were made below node i, in order
    draw_rows: Tensor,  # [D] int64: the drawn node, as a row of p; one drawn twice is there twice
    draw_q: Tensor,  # [D] int64: the row of q it was drawn from, before earlier draws from that row; -1: one-hot
    uniforms: Tensor,  # [R, U] float64 in [0, 1), U >= N + D
    rule: str,
    levels: int,  # of the deepest tree, its root's included; kernels of the traversal rule go through them one by one
) -> Tensor:
    """int64 [FIELDS * R + N]: every request's fields, then, where its nodes lie, its path filled up with -1."""
    check(p, q, uniforms, draw_rows, rule)
    requests = node_offsets.numel() - 1
    out = tokens.new_full((FIELDS * requests + tokens.numel(),), -1)
    for r in range(requests):
        first, end = int(node_offsets[r]), int(node_offsets[r + 1])
        path: list[int] = []
        bonus, chance = -1, _Uniforms(uniforms[r])
        if end > first:
            own, above = tokens[first:end].tolist(), parents[first:end].tolist()
            target = p[first:end].__getitem__
            if rule == "naive":
                path, bonus = naive(own, above, target, chance)
            else:

                def drawn(node: int, first: int = first, own: list[int] = own) -> Iterator[tuple[int, Tensor | None]]:
                    which = slice(int(draw_offsets[first + node]), int(draw_offsets[first + node + 1]))
                    pairs = zip(draw_rows[which].tolist(), draw_q[which].tolist())
                    for row, draws in groupby(pairs, key=itemgetter(1)):
                        below = [child - first for child, _ in draws]
                        yield from in_order(below, own, q[row] if row >= 0 else None, rule == "multi-step")

                walk = traversal if rule == "traversal" else rejection
                path, bonus = walk(own, target, drawn, chance)
        out[FIELDS * r : FIELDS * (r + 1)] = torch.tensor([len(path), bonus, chance.used])
        out[FIELDS * requests + first :][: len(path)] = torch.tensor(path, dtype=torch.int64)
    return out


class _Uniforms:
    """Given numbers, in order."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.tolist()
        self.used = 0

    def _next(self) -> float:
        self.used += 1
        return self._numbers[self.used - 1]

    def accept(self, probability: float) -> bool:
        return self._next() < probability

    def choose(self, weights: Tensor) -> int:
        """[V] to the first id whose cumulative weight is above u times the whole; never one of weight 0."""
        cumulative = weights.cumsum(0)
        above = (cumulative > self._next() * cumulative[-1]) & (weights > 0)
        # NOTE: where rounding leaves nothing above, the last id that has a weight
        return int(above.nonzero()[0] if above.any() else weights.nonzero()[-1])


def check(p: Tensor, q: Tensor, uniforms: Tensor, draw_rows: Tensor, rule: str) -> None:
    """What no kernel could survive."""
    if rule not in RULES:
        raise ValueError(f"got rule {rule!r}, expected one of {', '.join(RULES)}")
    if any(x.dtype is not torch.float64 for x in (p, q, uniforms)):
        raise ValueError(f"got {p.dtype}, {q.dtype} and {uniforms.dtype}, expected float64 for p, q and uniforms")
    needed = p.shape[0] + draw_rows.numel()
    if uniforms.shape[1] < needed:
        raise ValueError(f"got {uniforms.shape[1]} uniform numbers a request, expected {needed}: one a node and a draw")


def fake(
    p: Tensor,
    q: Tensor,
    tokens: Tensor,
    parents: Tensor,
    node_offsets: Tensor,
    draw_offsets: Tensor,
    draw_rows: Tensor,
    draw_q: Tensor,
    uniforms: Tensor,
    rule: str,
    levels: int,
) -> Tensor:
    return tokens.new_empty(FIELDS * (node_offsets.numel() - 1) + tokens.numel())


stochastic_accept: OpOverload = define("stochastic_accept", SCHEMA, reference, fake, COMPLIANT)
