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

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

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
            if rule == "naive":
                path, bonus = _naive(p[first:end], tokens[first:end].tolist(), parents[first:end].tolist(), chance)
            else:

                def draws(node: int, first: int = first) -> list[tuple[int, int]]:
                    which = slice(int(draw_offsets[first + node]), int(draw_offsets[first + node + 1]))
                    return [(row - first, g) for row, g in zip(draw_rows[which].tolist(), draw_q[which].tolist())]

                def state(node: int, weight: float = 1.0, first: int = first, draws: _Draws = draws) -> _State:
                    of_request = slice(first, None)
                    return _State(p[of_request][node], q, tokens[of_request], draws(node), weight, rule == "multi-step")

                path, bonus = (_traverse if rule == "traversal" else _walk)(state, chance)
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


def _naive(p: Tensor, tokens: list[int], parents: list[int], chance: _Uniforms) -> tuple[list[int], int]:
    path, want = [0], chance.choose(p[0])
    for node in range(1, len(tokens)):
        if parents[node] == path[-1] and tokens[node] == want:
            path.append(node)
            want = chance.choose(p[node])
    return path, want


_Draws: TypeAlias = Callable[[int], list[tuple[int, int]]]
"""Node -> child and row of q of each draw below it."""


class _State:
    """A node whose draws are tried and rejected in turn: its weight, and what is still owed after it."""

    def __init__(
        self, p: Tensor, q: Tensor, tokens: Tensor, draws: list[tuple[int, int]], weight: float, replacement: bool
    ) -> None:
        self.owed, self.weight = p, weight
        self._q, self._tokens, self._draws, self._replacement = q, tokens, iter(draws), replacement
        self._row, self._proposed = -1, p

    def next_child(self) -> tuple[int, float] | None:
        """The next drawn child, and the weight it gets."""
        child, row = next(self._draws, (-1, -1))
        if child < 0:
            return None
        if row < 0:
            self._proposed = torch.zeros_like(self.owed).index_fill_(0, self._tokens[child], 1.0)
        elif row != self._row:
            self._proposed = self._q[row]
        self._child, self._row = child, row
        token = int(self._tokens[child])
        return child, _ratio(self.weight * float(self.owed[token]), float(self._proposed[token]))

    def reject(self, weigh: bool = False) -> None:
        """The child was not accepted; `weigh`: nor anything below it, which changes this node's weight."""
        rest = (self.weight * self.owed - self._proposed).clamp_min(0.0)
        total = float(rest.sum())
        if total > 0.0:
            self.owed = rest / total
        if weigh and total + 1.0 - self.weight > 0.0:
            self.weight = min(1.0, total / (total + 1.0 - self.weight))
        if not self._replacement and self._row >= 0:
            left = self._proposed.index_fill(0, self._tokens[self._child], 0.0)
            self._proposed = left / left.sum() if left.sum() > 0 else left


def _walk(state: Callable[..., _State], chance: _Uniforms) -> tuple[list[int], int]:
    path = [0]
    while True:
        here = state(path[-1])
        while (drawn := here.next_child()) is not None:
            child, probability = drawn
            if chance.accept(probability):
                path.append(child)
                break
            here.reject()
        else:
            return path, chance.choose(here.owed)


def _traverse(state: Callable[..., _State], chance: _Uniforms) -> tuple[list[int], int]:
    path, states = [0], [state(0)]
    while True:
        here = states[-1]
        drawn = here.next_child()
        if drawn is None:
            if len(path) == 1 or chance.accept(here.weight):
                return path, chance.choose(here.owed)
            path.pop(), states.pop()
            states[-1].reject(weigh=True)
        elif drawn[1] > 0.0:
            path.append(drawn[0])
            states.append(state(*drawn))
        else:
            here.reject(weigh=True)


def _ratio(p: float, q: float) -> float:
    if p <= 0.0:
        return 0.0
    return 1.0 if p >= q else p / q


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
