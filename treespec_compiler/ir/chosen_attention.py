"""`treespec::tree_chosen_attention`: attention in which each node sees only the keys that an indexer chooses for it.

An indexer scores every token that a node may see, its committed prefix and its own ancestors, and the node attends to
the `chosen` best alone:

    s_h = index_scale * index_q_h . index_k                                  for each index head h
    with weights     score = sum_h index_weights_h relu(s_h)                 one choice, for all heads of attention
    without          score_h = s_h                                           a choice for each of H groups of heads
    block > 1        score of a block of positions = the largest of its tokens'; blocks are chosen, `local` of them, the
                     node's own and those before it, ahead of all others

Ties are decided by torch.topk on the node's own path: as many scores as the path has tokens (or blocks), in their
order. That is what the model computes when it decodes the path's last token.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from .attention import append, empty_output, seen_nodes, stored, tree_attention
from .library import define, definition
from .private_torch import OpOverload

INDEX = "Tensor index_q, Tensor index_k, Tensor? index_weights"
SCHEMA = (
    f"(Tensor q, Tensor k, Tensor v, {INDEX}, Tensor(a!) pool_k, Tensor(b!) pool_v, Tensor(c!) pool_index, "
    "Tensor positions, Tensor write_index, Tensor node_offsets, Tensor page_table, Tensor prefix_lens, "
    "Tensor tree_lens, Tensor ancestors, float scale, float index_scale, int chosen, int block, int local) -> Tensor"
)


def index_scores(q: Tensor, k: Tensor, weights: Tensor | None, scale: float) -> Tensor:
    """q [N, H, D], k [S, D], weights [N, H] -> [N, 1, S], or [N, H, S] without weights; in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    s = torch.matmul(q.to(wide), k.to(wide).T) * scale
    return s if weights is None else torch.matmul(weights.to(wide).unsqueeze(1), s.relu())


def block_scores(s: Tensor, block: int, local: int) -> Tensor:
    """Of one path: s [.., S] -> [.., blocks], the last `local` of which are infinite."""
    if block == 1:
        return s
    count = -(-s.shape[-1] // block)
    padded = torch.nn.functional.pad(s, (0, count * block - s.shape[-1]), value=-torch.inf)
    best = padded.unflatten(-1, (count, block)).amax(-1)
    best[..., max(0, count - local) :] = torch.inf
    return best


def chosen_keys(s: Tensor, chosen: int, block: int, local: int) -> Tensor:
    """Of one path, by its scores: s [C, S] -> bool [C, S]."""
    best = block_scores(s, block, local)
    kept = torch.zeros(best.shape, dtype=torch.bool, device=s.device)
    kept.scatter_(-1, best.topk(min(chosen, best.shape[-1]), -1).indices, True)
    return kept.repeat_interleave(block, -1)[..., : s.shape[-1]]


def append_index(index_k: Tensor, pool_index: Tensor, write_index: Tensor) -> None:
    """Write index_k [1, T, D] into pool_index [pages, 1, page_size, D], except where `write_index` is negative."""
    somewhere = write_index >= 0
    where, page_size = write_index[somewhere], pool_index.shape[2]
    pool_index[where // page_size, 0, where % page_size] = index_k[0, somewhere].to(pool_index.dtype)


def reference(
    q: Tensor,  # [1, Hq, T, Dk]
    k: Tensor,  # [1, Hkv, T, Dk]
    v: Tensor,  # [1, Hkv, T, Dv]
    index_q: Tensor,  # [1, T, H, D]
    index_k: Tensor,  # [1, T, D]
    index_weights: Tensor | None,  # [1, T, H]
    pool_k: Tensor,  # [pages, Hkv, page_size, Dk], written
    pool_v: Tensor,  # [pages, Hkv, page_size, Dv], written
    pool_index: Tensor,  # [pages, 1, page_size, D], written
    positions: Tensor,
    write_index: Tensor,
    node_offsets: Tensor,
    page_table: Tensor,
    prefix_lens: Tensor,
    tree_lens: Tensor,
    ancestors: Tensor,
    scale: float,
    index_scale: float,
    chosen: int,
    block: int,
    local: int,
) -> Tensor:  # [1, Hq, T, Dv], laid out as [1, T, Hq, Dv]
    """Write K, V and index keys, then choose and attend node by node; rows that belong to no request give 0."""
    append(k, v, pool_k, pool_v, write_index)
    append_index(index_k, pool_index, write_index)
    pages = page_table
    pool_k, pool_v, page_table = stored(pool_k, pool_v, pages, write_index)
    pool_index = stored(pool_index, pool_index, pages, write_index)[0]
    page_size, group = pool_k.shape[2], q.shape[1] // k.shape[1]

    out = empty_output(q, v).zero_()
    wide = torch.promote_types(q.dtype, torch.float32)
    for r in range(prefix_lens.numel()):
        prefix, end = int(prefix_lens[r]), int(node_offsets[r + 1])
        for i in range(int(node_offsets[r]), end):
            path = seen_nodes(ancestors, i, int(tree_lens[r]) - end + i)
            places = torch.tensor([*range(prefix), *(prefix + j for j in path)], device=q.device)
            page, offset = page_table[r, places // page_size], places % page_size
            weights = None if index_weights is None else index_weights[0, i : i + 1]
            s = index_scores(index_q[0, i : i + 1], pool_index[page, 0, offset], weights, index_scale)[0]
            kept = chosen_keys(s, chosen, block, local)  # [C, seen]
            keys = pool_k[page, :, offset].repeat_interleave(group, 1).to(wide)  # [seen, Hq, Dk]
            values = pool_v[page, :, offset].repeat_interleave(group, 1).to(wide)
            scores = torch.einsum("hd,shd->hs", q[0, :, i].to(wide), keys) * scale
            for_heads = kept.repeat_interleave(q.shape[1] // len(kept), 0)
            attends = scores.masked_fill(~for_heads, -torch.inf).softmax(-1)
            # NOTE 0 times a NaN that is not seen would be NaN: values are finite (`append`), keys need not be.
            out[0, :, i] = torch.einsum("hs,shd->hd", attends, values).to(q.dtype)
    return out


def fake(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    return empty_output(q, v)


tree_chosen_attention: OpOverload = define("tree_chosen_attention", SCHEMA, reference, fake)

OVER_TREES = frozenset({tree_attention, tree_chosen_attention})


def is_tree_attention(node: fx.Node) -> bool:
    """Attention over trees of either kind, bound to a kernel or not."""
    return definition(node.target) in OVER_TREES
