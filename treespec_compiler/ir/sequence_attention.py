"""Attention over one whole sequence: the two ops between recognition and treeification.

`treespec::attention` is what was found (any mask), `treespec::causal_attention` what was proved (a MaskSpec).
Both take q [1, Hq, T, Dk], k [1, Hkv, T, Dk], v [1, Hkv, T, Dv] with Hq a multiple of Hkv and return [1, Hq, T, Dv].
They exist to be analysed and checked; the tree program never runs them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .specs import MaskSpec


def _shared_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)


@torch.library.custom_op("treespec::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """softmax(scale * q k^T + mask) v, as torch's scaled_dot_product_attention defines it."""
    k, v = _shared_heads(q, k, v)
    return scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale).contiguous()


@torch.library.custom_op("treespec::causal_attention", mutates_args=())
def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """Attention in which query i sees key j when 0 <= i - j, and i - j < window unless window is 0."""
    k, v = _shared_heads(q, k, v)
    steps = torch.arange(q.shape[2], device=q.device)
    seen = MaskSpec(window).visible(steps[:, None], steps[None, :])
    return scaled_dot_product_attention(q, k, v, seen, scale=scale).contiguous()


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


@causal_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))
