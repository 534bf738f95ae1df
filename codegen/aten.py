"""`treespec_aten::tree_attention`: ATen's scaled_dot_product_attention for each request, any device and float dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from treespec_compiler.ir import attention


def visible(positions: Tensor, ancestors: Tensor, prefix: int, nodes: int, window: int) -> Tensor:
    """[T, prefix + nodes] bool: what each of one request's new nodes sees, by offset in its slot."""
    tree = topology(ancestors, nodes)
    if not window:
        return torch.cat([tree.new_ones(len(tree), prefix), tree], 1).bool()
    rank = tree.cumsum(1)  # of an ancestor: its depth + 1
    near = rank[:, -1:] - rank < window
    offsets = torch.arange(prefix, device=ancestors.device)
    return torch.cat([positions.unsqueeze(1) - offsets < window, tree.bool() & near], 1)


def topology(ancestors: Tensor, nodes: int) -> Tensor:
    """[T, nodes] of 0 and 1: which of one request's nodes are ancestors of its T new ones, or the node itself."""
    if not ancestors.shape[1]:  # a chain, see `TreeMeta`
        new = ancestors.shape[0]
        return ancestors.new_ones(new, nodes).tril(nodes - new)
    bits = ancestors.unsqueeze(-1) >> torch.arange(64, device=ancestors.device) & 1
    return bits.flatten(1)[:, :nodes]


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
    window: int,
) -> Tensor:
    write(k, v, pool_k, pool_v, write_index)
    pool_k, pool_v, page_table = attention.stored(pool_k, pool_v, page_table, write_index)
    kv_heads, page_size = pool_k.shape[1], pool_k.shape[2]
    group = q.shape[1] // kv_heads

    out = attention.empty_output(q, v)
    bounds, pages = node_offsets.tolist(), page_table.tolist()
    out[:, :, : bounds[0]] = 0
    out[:, :, bounds[-1] :] = 0
    for r, (prefix, nodes) in enumerate(zip(prefix_lens.tolist(), tree_lens.tolist())):
        rows = slice(bounds[r], bounds[r + 1])
        if rows.start == rows.stop:
            continue
        length = prefix + nodes
        used = pages[r][: -(-length // page_size)]
        mask = None
        if nodes > 1 or window:
            mask = visible(positions[rows], ancestors[rows], prefix, nodes, window).repeat(group, 1)
        packed = q[0, :, rows].reshape(kv_heads, -1, q.shape[3])  # [Hq, T, D] -> [Hkv, G*T, D]
        result = F.scaled_dot_product_attention(
            packed.unsqueeze(0),
            tokens(pool_k, used, length).to(q.dtype).unsqueeze(0),
            tokens(pool_v, used, length).to(q.dtype).unsqueeze(0),
            attn_mask=mask,
            scale=scale,
        )
        out[0, :, rows] = result.reshape(q.shape[1], -1, v.shape[3])  # [Hkv, G*T, D] -> [Hq, T, D]
    return out


def write(k: Tensor, v: Tensor, pool_k: Tensor, pool_v: Tensor, write_index: Tensor) -> None:
    """Every new node's K and V into the pools; `write_index` names a place for each."""
    page_size = pool_k.shape[2]
    at = (write_index // page_size, slice(None), write_index % page_size)
    pool_k[at] = k[0].transpose(0, 1).to(pool_k.dtype)
    pool_v[at] = v[0].transpose(0, 1).to(pool_v.dtype)


def tokens(pool: Tensor, pages: list[int], length: int) -> Tensor:
    """[Hkv, length, D]: the first tokens of a slot, a view where it has one page."""
    whole = pool[pages[0]] if len(pages) == 1 else torch.cat([pool[p] for p in pages], 1)
    return whole[:, :length]


_library = torch.library.Library("treespec_aten", "FRAGMENT")
_library.define("tree_attention" + attention.SCHEMA, tags=attention.TAGS)
_library.impl("tree_attention", tree_attention, "CompositeExplicitAutograd")
torch.library.register_fake("treespec_aten::tree_attention", attention.fake, lib=_library)

TREE_ATTENTION: OpOverload = torch.ops.treespec_aten.tree_attention.default
