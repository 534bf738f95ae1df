"""`treespec_aten::scored_tree_attention`: dense scores for each request, any device and float dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._ops import OpOverload

from treespec_compiler.ir import attention, scored_attention
from treespec_compiler.ir.scored_attention import changed_scores, softmax_with_sinks

from .aten import tokens, topology, visible, write


def key_positions(ancestors: Tensor, prefix: int, nodes: int) -> Tensor:
    """[T, prefix + nodes]: the position of each key on the path of each node; only ancestors' entries mean anything."""
    depth = topology(ancestors, nodes).cumsum(1) - 1
    before = torch.arange(prefix, device=ancestors.device).expand(len(ancestors), prefix)
    return torch.cat([before, prefix + depth], 1)


def scored_tree_attention(
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
    window: int,
    chunk: int,
    softcap: float,
    slopes: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    write(k, v, pool_k, pool_v, write_index)
    pool_k, pool_v, page_table = attention.stored(pool_k, pool_v, page_table, write_index)
    heads, kv_heads, page_size = q.shape[1], pool_k.shape[1], pool_k.shape[2]

    out = attention.empty_output(q, v)
    wide = torch.promote_types(q.dtype, torch.float32)
    bounds, pages = node_offsets.tolist(), page_table.tolist()
    out[:, :, : bounds[0]] = 0
    out[:, :, bounds[-1] :] = 0
    for r, (prefix, nodes) in enumerate(zip(prefix_lens.tolist(), tree_lens.tolist(), strict=True)):
        rows = slice(bounds[r], bounds[r + 1])
        if rows.start == rows.stop:
            continue
        length = prefix + nodes
        used = pages[r][: -(-length // page_size)]
        keys, values = tokens(pool_k, used, length).to(wide), tokens(pool_v, used, length).to(wide)
        here, there = positions[rows].unsqueeze(1), key_positions(ancestors[rows], prefix, nodes)
        seen = visible(positions[rows], ancestors[rows], prefix, nodes, window)
        if chunk:
            seen = seen & (here // chunk == there // chunk)
        grouped = q[0, :, rows].to(wide).reshape(kv_heads, -1, q.shape[3])  # [Hq, T, D] -> [Hkv, G*T, D]
        s = (grouped @ keys.transpose(1, 2) * scale).reshape(heads, -1, length)  # [Hq, T, S]
        s = changed_scores(s, here - there, softcap, slopes, bias).masked_fill(~seen, -torch.inf)
        weights = softmax_with_sinks(s, sinks).reshape(kv_heads, -1, length)
        out[0, :, rows] = (weights @ values).reshape(heads, -1, v.shape[3]).to(q.dtype)
    return out


_library = torch.library.Library("treespec_aten", "FRAGMENT")
_library.define("scored_tree_attention" + scored_attention.SCHEMA, tags=attention.TAGS)
_library.impl("scored_tree_attention", scored_tree_attention, "CompositeExplicitAutograd")
torch.library.register_fake("treespec_aten::scored_tree_attention", scored_attention.fake, lib=_library)

SCORED_TREE_ATTENTION: OpOverload = torch.ops.treespec_aten.scored_tree_attention.default
