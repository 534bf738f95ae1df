"""Attention over one whole sequence: the two ops between recognition and treeification.

`treespec::attention` is what was found (any mask), `treespec::causal_attention` what was proved (a MaskSpec). Two ops
and not one with every argument: a graph says by their names which of its masks are understood.
Both take q [1, Hq, T, Dk], k [1, Hkv, T, Dk], v [1, Hkv, T, Dv] with Hq a multiple of Hkv and return [1, Hq, T, Dv],
and change and weight scores as in `scores`: slopes [Hq], bias [Hq, distances] or [T, Hq, distances], sinks [Hq].
They exist to be analysed and checked; the tree program never runs them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .library import define
from .private_torch import OpOverload
from .scores import SOFTMAX, attention_weights, changed_scores
from .specs import MaskSpec

_HIDDEN = -1e4  # what a mask adds at or below this hides a key

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float scale, float softcap=0.0, "
    'Tensor? sinks=None, Tensor? relative=None, Tensor? pairs=None, str activation="softmax") -> Tensor'
)
CAUSAL_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, float scale, SymInt window=0, SymInt chunk=0, float softcap=0.0, "
    'Tensor? slopes=None, Tensor? bias=None, Tensor? sinks=None, str pattern="", '
    'str activation="softmax") -> Tensor'
)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    relative: Tensor | None = None,
    pairs: Tensor | None = None,
    activation: str = SOFTMAX,
) -> Tensor:
    """activation(scale * q k^T + mask) v, as torch's scaled_dot_product_attention defines it.

    With `relative` [1, Hq, T, D'] and `pairs` [1 or Hq, D', T, T] their product over D' is added for j <= i.
    """
    k, v = _for_every_head(q, k, v)
    if not softcap and sinks is None and relative is None and activation == SOFTMAX:
        return scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale).contiguous()
    s = changed_scores((q @ k.transpose(2, 3) * scale)[0], _distances(q), softcap, None, None)
    if relative is not None and pairs is not None:
        vectors = pairs.masked_fill(_distances(q) < 0, 0.0)
        s = s + torch.einsum("hid,hdij->hij", relative[0], vectors.expand(q.shape[1], -1, -1, -1))
    seen = _distances(q) >= 0 if is_causal else None
    if mask is not None and mask.dtype is torch.bool:
        seen = mask[0]
    elif mask is not None:
        s = s + mask[0]
        # NOTE not every activation makes 0 of minus infinity: what hides is the mask's.
        seen = None if activation == SOFTMAX else mask[0] > _HIDDEN
    return attention_weights(s, seen, sinks, activation).unsqueeze(0) @ v


def causal_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    pattern: str = "",
    activation: str = SOFTMAX,
) -> Tensor:
    """Attention in which query i sees key j as `MaskSpec(window, chunk=chunk, pattern=pattern)` says."""
    k, v = _for_every_head(q, k, v)
    steps = torch.arange(q.shape[2], device=q.device)
    seen = MaskSpec(window, chunk=chunk, pattern=pattern).visible(steps[:, None], steps[None, :])
    if not softcap and slopes is None and bias is None and sinks is None and activation == SOFTMAX:
        return scaled_dot_product_attention(q, k, v, seen, scale=scale).contiguous()
    s = changed_scores((q @ k.transpose(2, 3) * scale)[0], _distances(q), softcap, slopes, bias)
    return attention_weights(s, seen, sinks, activation).unsqueeze(0) @ v


def _for_every_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)


def _distances(q: Tensor) -> Tensor:
    steps = torch.arange(q.shape[2], device=q.device)
    return steps[:, None] - steps[None, :]


def fake(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


attention: OpOverload = define("attention", SCHEMA, reference, fake)
causal_attention: OpOverload = define("causal_attention", CAUSAL_SCHEMA, causal_reference, fake)
