"""`treespec_aten::tree_attention`: ATen's attention for each request, on any device and in any float dtype.

Plain scores go to scaled_dot_product_attention; changed ones, chunks, and keys that are not finite are computed
densely: a mask of scaled_dot_product_attention is added, and NaN less infinity is NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from treespec_compiler.ir import ops
from treespec_compiler.ir.attention import append, empty_output, stored
from treespec_compiler.ir.library import implement
from treespec_compiler.ir.private_torch import OpOverload
from treespec_compiler.ir.scores import SOFTMAX, attention_weights, changed_scores
from treespec_compiler.ir.specs import MaskSpec

OPTIONAL = frozenset({"window", "chunk", "softcap", "slopes", "bias", "sinks", "pattern", "activation"})
"""The optional arguments of the op that it takes: q and k come rotated."""


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool_k: Tensor,
    pool_v: Tensor,
    positions: Tensor,
    write_index: Tensor,
    node_offsets: Tensor,
    page_table: Tensor,
    prefix_lens: Tensor,
    tree_lens: Tensor,
    ancestors: Tensor,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    cos: None = None,
    sin: None = None,
    style: str = "half",
    rotary: int = 0,
    pattern: str = "",
    activation: str = SOFTMAX,
) -> Tensor:
    append(k, v, pool_k, pool_v, write_index)
    pool_k, pool_v, page_table = stored(pool_k, pool_v, page_table, write_index)
    page_size = pool_k.shape[2]
    changed = chunk or softcap or slopes is not None or bias is not None or sinks is not None
    plain = not changed and activation == SOFTMAX

    out = empty_output(q, v)
    bounds, pages = node_offsets.tolist(), page_table.tolist()
    out[:, :, : bounds[0]] = 0
    out[:, :, bounds[-1] :] = 0
    for r, (prefix, nodes) in enumerate(zip(prefix_lens.tolist(), tree_lens.tolist(), strict=True)):
        rows = slice(bounds[r], bounds[r + 1])
        if rows.start == rows.stop:
            continue
        used = pages[r][: -(-(prefix + nodes) // page_size)]
        keys, values = (tokens(pool, used, prefix + nodes) for pool in (pool_k, pool_v))
        seen = None
        if nodes > 1 or window or chunk or pattern:
            seen = visible(positions[rows], ancestors[rows], prefix, nodes, window, chunk, pattern)
        if plain and (seen is None or bool(keys.sum(dtype=torch.float32).isfinite())):
            out[0, :, rows] = _plain(q[0, :, rows], keys, values, seen, scale)
        else:
            distance = positions[rows].unsqueeze(1) - key_positions(ancestors[rows], prefix, nodes)
            s = _scores(q[0, :, rows], keys, scale)
            own = bias[rows] if bias is not None and bias.dim() == 3 else bias
            s = changed_scores(s, distance, softcap, slopes, own)
            out[0, :, rows] = _weighted(s, values, seen, sinks, activation).to(q.dtype)
    return out


def _plain(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """q [Hq, T, Dk], keys [Hkv, S, Dk], values [Hkv, S, Dv], seen [T, S] -> [Hq, T, Dv]."""
    kv_heads, group = keys.shape[0], q.shape[0] // keys.shape[0]
    result = F.scaled_dot_product_attention(
        q.reshape(1, kv_heads, -1, q.shape[2]),  # [Hq, T, D] -> [Hkv, G*T, D]
        keys.to(q.dtype).unsqueeze(0),
        values.to(q.dtype).unsqueeze(0),
        attn_mask=None if seen is None else seen.repeat(group, 1),
        scale=scale,
    )
    return result.reshape(q.shape[0], -1, values.shape[2])


def _scores(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """[Hq, T, S], in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).reshape(keys.shape[0], -1, q.shape[2])
    return (grouped @ keys.to(wide).transpose(1, 2) * scale).reshape(*q.shape[:2], -1)


def _weighted(s: Tensor, values: Tensor, seen: Tensor | None, sinks: Tensor | None, activation: str) -> Tensor:
    """s [Hq, T, S], values [Hkv, S, Dv] -> [Hq, T, Dv]."""
    weights = attention_weights(s, seen, sinks, activation).reshape(values.shape[0], -1, s.shape[2])
    return (weights @ values.to(s.dtype)).reshape(*s.shape[:2], -1)


def visible(
    positions: Tensor, ancestors: Tensor, prefix: int, nodes: int, window: int, chunk: int = 0, pattern: str = ""
) -> Tensor:
    """[T, prefix + nodes] bool: what each of one request's new nodes sees, by offset in its slot."""
    tree = topology(ancestors, nodes)
    seen = torch.cat([tree.new_ones(len(tree), prefix), tree], 1).bool()
    if not window and not chunk and not pattern:
        return seen
    here, there = positions.unsqueeze(1), key_positions(ancestors, prefix, nodes)
    if window:
        seen &= here - there < window
    if chunk:
        seen &= here // chunk == there // chunk
    if pattern:
        seen &= MaskSpec(pattern=pattern).visible(here, there)
    return seen


def topology(ancestors: Tensor, nodes: int) -> Tensor:
    """[T, nodes] of 0 and 1: which of one request's nodes are ancestors of its T new ones, or the node itself."""
    if not ancestors.shape[1]:  # a chain, see `TreeMeta`
        new = ancestors.shape[0]
        return ancestors.new_ones(new, nodes).tril(nodes - new)
    bits = ancestors.unsqueeze(-1) >> torch.arange(64, device=ancestors.device) & 1
    return bits.flatten(1)[:, :nodes]


def key_positions(ancestors: Tensor, prefix: int, nodes: int) -> Tensor:
    """[T, prefix + nodes]: the position of each key on the path of each node; only ancestors' entries mean anything."""
    depth = topology(ancestors, nodes).cumsum(1) - 1
    before = torch.arange(prefix, device=ancestors.device).expand(len(ancestors), prefix)
    return torch.cat([before, prefix + depth], 1)


def tokens(pool: Tensor, pages: list[int], length: int) -> Tensor:
    """[Hkv, length, D]: the first tokens of a slot, a view where it has one page."""
    whole = pool[pages[0]] if len(pages) == 1 else torch.cat([pool[p] for p in pages], 1)
    return whole[:, :length]


TREE_ATTENTION: OpOverload = implement(ops.tree_attention, "treespec_aten", tree_attention)
