"""What attention does with its scores: softcap, ALiBi, relative bias and sinks, on whole tensors of scores.

For query position i and key position j of one path, with s = scale * q.k:

    s <- softcap * tanh(s / softcap)          (softcap > 0)
    s <- s + slopes[h] * (j - i) + bias[h, i - j]        (or bias[i, h, i - j]: each query has its own)
    weights = exp(s) / (sum exp(s) + exp(sinks[h]))

Positions along a path are consecutive, so i - j is a difference of depths inside the tree.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
