"""`treespec::greedy_accept`: which nodes of a verified forest the target's own argmax would have produced."""

from __future__ import annotations

import torch
from torch import Tensor

from .acceptance import follow
from .library import COMPLIANT, define
from .private_torch import OpOverload

SCHEMA = "(Tensor logits, Tensor tokens, Tensor parents, Tensor node_offsets, float tie) -> Tensor"

FIELDS = 4
"""Integers of a request before the paths: accepted nodes, bonus token, place of the first unusable one, near tie."""


def reference(logits: Tensor, tokens: Tensor, parents: Tensor, node_offsets: Tensor, tie: float) -> Tensor:
    """What one readback tells of R requests: int64 [FIELDS * R + N].

    logits [N, V]; tokens and parents [N] int64, parents within the request, its first node is its only root;
    node_offsets [R + 1] int64. First, for every request: the number of accepted nodes, the target's token after them,
    the place in the path of the first node whose row is NaN, infinite or all -inf (-1: none), and whether two logits of
    a row of the path lie within `tie` of each other, relative to the larger (tie = 0: never). Then, where the request's
    nodes lie, its path, filled up with -1. The largest logit wins, the lowest id of a tie; NaN is above all others.
    """
    requests = node_offsets.numel() - 1
    out = tokens.new_full((FIELDS * requests + tokens.numel(),), -1)
    for r in range(requests):
        first, end = int(node_offsets[r]), int(node_offsets[r + 1])
        rows = logits[first:end]
        choices, path = rows.argmax(-1).tolist(), [0] if end > first else []
        if path:
            follow(tokens[first:end].tolist(), parents[first:end].tolist(), path, choices[0], choices.__getitem__)
        unusable = [place for place, node in enumerate(path) if not rows[node].max().isfinite()]
        out[FIELDS * r] = len(path)
        if path:
            out[FIELDS * r + 1] = rows[path[-1]].argmax()
        out[FIELDS * r + 2] = unusable[0] if unusable else -1
        out[FIELDS * r + 3] = any_near_tie(rows[path], tie)
        out[FIELDS * requests + first :][: len(path)] = torch.tensor(path, dtype=torch.int64)
    return out


def any_near_tie(rows: Tensor, tie: float) -> bool:
    """Whether the two largest logits of any row [n, V] are finite and within `tie` of the larger magnitude."""
    if not tie or rows.shape[1] < 2:
        return False
    best = rows.float().topk(2, dim=-1).values  # [n, 2]
    near = best[:, 0] - best[:, 1] <= tie * best.abs().amax(-1)
    return bool((near & best.isfinite().all(-1)).any())  # nothing is near a logit that stands alone


def fake(logits: Tensor, tokens: Tensor, parents: Tensor, node_offsets: Tensor, tie: float) -> Tensor:
    return tokens.new_empty(FIELDS * (node_offsets.numel() - 1) + tokens.numel())


greedy_accept: OpOverload = define("greedy_accept", SCHEMA, reference, fake, COMPLIANT)
