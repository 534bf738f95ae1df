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

from .chosen_attention import chosen_keys, index_scores
from .library import define
from .private_torch import OpOverload
from .scores import SOFTMAX, attention_weights, changed_scores
from .specs import MaskSpec

_HIDDEN = -1e4  # what a mask adds at or below this hides a key

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float scale, float softcap=0.0, "
    'Tensor? sinks=None, Tensor? relative=None, Tensor? pairs=None, str activation="softmax", Tensor? index_q=None, '
    "Tensor? index_k=None, Tensor? index_weights=None, Tensor? index_mask=None, float index_scale=1.0, int chosen=0, "
    "int block=1, int local=0) -> Tensor"
)
CAUSAL_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, float scale, SymInt window=0, SymInt chunk=0, float softcap=0.0, "
    'Tensor? slopes=None, Tensor? bias=None, Tensor? sinks=None, str pattern="", '
    'str activation="softmax", Tensor? index_q=None, Tensor? index_k=None, Tensor? index_weights=None, '
    "float index_scale=1.0, int chosen=0, int block=1, int local=0) -> Tensor"
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
    index_q: Tensor | None = None,
    index_k: Tensor | None = None,
    index_weights: Tensor | None = None,
    index_mask: Tensor | None = None,
    index_scale: float = 1.0,
    chosen: int = 0,
    block: int = 1,
    local: int = 0,
) -> Tensor:
    """activation(scale * q k^T + mask) v, as torch's scaled_dot_product_attention defines it.

    With `index_q`, an indexer (`ir.chosen_attention`) hides what it does not choose: it was found behind a mask of its
    own, `index_mask`, which must be proved to be causal. With `relative` [1, Hq, T, D'] and `pairs` [1 or Hq, D', T, T]
    their product over D' is added for j <= i.
    """
    k, v = _for_every_head(q, k, v)
    if index_q is not None and index_k is not None:
        kept = _kept(q, index_q, index_k, index_weights, index_scale, chosen, block, local)
        s = (q @ k.transpose(2, 3) * scale)[0]
        if mask is not None:
            kept = kept & mask[0] if mask.dtype is torch.bool else kept & (mask[0] > _HIDDEN)
        return attention_weights(s, kept, None, activation).unsqueeze(0) @ v
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
    index_q: Tensor | None = None,
    index_k: Tensor | None = None,
    index_weights: Tensor | None = None,
    index_scale: float = 1.0,
    chosen: int = 0,
    block: int = 1,
    local: int = 0,
) -> Tensor:
    """Attention in which query i sees key j as `MaskSpec(window, chunk=chunk, pattern=pattern)` says,
    and an indexer where there is one."""
    k, v = _for_every_head(q, k, v)
    steps = torch.arange(q.shape[2], device=q.device)
    seen = MaskSpec(window, chunk=chunk, pattern=pattern).visible(steps[:, None], steps[None, :])
    if index_q is not None and index_k is not None:
        kept = _kept(q, index_q, index_k, index_weights, index_scale, chosen, block, local)
        return attention_weights((q @ k.transpose(2, 3) * scale)[0], seen & kept, None, activation).unsqueeze(0) @ v
    if not softcap and slopes is None and bias is None and sinks is None and activation == SOFTMAX:
        return scaled_dot_product_attention(q, k, v, seen, scale=scale).contiguous()
    s = changed_scores((q @ k.transpose(2, 3) * scale)[0], _distances(q), softcap, slopes, bias)
    return attention_weights(s, seen, sinks, activation).unsqueeze(0) @ v


def _kept(
    q: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    weights: Tensor | None,
    scale: float,
    chosen: int,
    block: int,
    local: int,
) -> Tensor:
    """bool [Hq, T, T]: what is chosen of each token and those before it, for each head of q [1, Hq, T, Dk]."""
    tokens = q.shape[2]
    s = index_scores(index_q[0], index_k[0], None if weights is None else weights[0], scale)  # [T, C, T]
    kept = torch.zeros(tokens, s.shape[1], tokens, dtype=torch.bool, device=q.device)
    for i in range(tokens):
        kept[i, :, : i + 1] = chosen_keys(s[i, :, : i + 1], chosen, block, local)
    return kept.transpose(0, 1).repeat_interleave(q.shape[1] // s.shape[1], 0)


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
