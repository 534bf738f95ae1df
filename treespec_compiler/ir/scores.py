"""What attention does with its scores: softcap, ALiBi, relative bias, sinks and weights, on whole tensors of scores.

For query position i and key position j of one path, with s = scale * q.k:

    s <- softcap * tanh(s / softcap)          (softcap > 0)
    s <- s + slopes[h] * (j - i) + bias[h, i - j]        (or bias[i, h, i - j]: each query has its own)
    weights = exp(s) / (sum exp(s) + exp(sinks[h]))          (activation "softmax")
    weights = f(s)                                           (any other: of each score alone, and 0 for a hidden key)

Positions along a path are consecutive, so i - j is a difference of depths inside the tree.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SOFTMAX = "softmax"
POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,  # arXiv 2409.04431
    "relu": torch.relu,  # arXiv 2309.08586
    "relu squared": lambda s: torch.relu(s).square(),  # arXiv 2202.10447
    "identity": lambda s: s,  # linear attention in its quadratic form, arXiv 2006.16236
}
"""Weights that are made of each score alone, by the name of the activation. A further one is one more line here, and
one in `passes.attention.pointwise` that reads it."""
ACTIVATIONS = (SOFTMAX, *POINTWISE)


def changed_scores(s: Tensor, distance: Tensor, softcap: float, slopes: Tensor | None, bias: Tensor | None) -> Tensor:
    """Scores [H, ..., S] for distances i - j [..., S]."""
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    shape = (-1,) + (1,) * distance.dim()
    if slopes is not None:
        s = s - slopes.to(s.dtype).view(shape) * distance
    if bias is not None and bias.dim() == 3:  # [T, H, distances] for distances [T, S]
        rows = bias.to(s.dtype).transpose(0, 1)
        s = s + rows.gather(-1, distance.clamp(0, bias.shape[2] - 1).expand(len(rows), *distance.shape))
    elif bias is not None:
        s = s + bias.to(s.dtype)[:, distance.clamp(0, bias.shape[1] - 1)]
    return s


def softmax_with_sinks(s: Tensor, sinks: Tensor | None) -> Tensor:
    """exp(s) / (sum exp(s) + exp(sink)) over the last dimension; s [H, ..., S], sinks [H]."""
    if sinks is None:
        return s.softmax(-1)
    column = sinks.to(s.dtype).view((-1,) + (1,) * (s.dim() - 1)).expand(*s.shape[:-1], 1)
    return torch.cat([s, column], -1).softmax(-1)[..., :-1]


def attention_weights(s: Tensor, seen: Tensor | None, sinks: Tensor | None, activation: str) -> Tensor:
    """Weights of scores [H, ..., S], where `seen` [..., S] (None: everywhere); elsewhere they are 0."""
    if activation != SOFTMAX:
        weights = POINTWISE[activation](s)
        return weights if seen is None else weights.masked_fill(~seen, 0.0)
    return softmax_with_sinks(s if seen is None else s.masked_fill(~seen, -torch.inf), sinks)
