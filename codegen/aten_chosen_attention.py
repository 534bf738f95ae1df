"""`treespec_aten::tree_chosen_attention`: an indexer's choice for all new nodes of a request, then dense attention.

The scores of a node's path stand among those of tokens that it does not see. What is chosen of them is what is chosen
of the path alone unless scores at the border are equal: then torch.topk decides by their number and order, and the row
is asked again, by itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from treespec_compiler.ir import ops
from treespec_compiler.ir.attention import append, empty_output, stored
from treespec_compiler.ir.chosen_attention import append_index, chosen_keys, index_scores
from treespec_compiler.ir.library import implement
from treespec_compiler.ir.private_torch import OpOverload

from .aten import tokens, visible

MOST = 1 << 24
"""Scores of an indexer's heads that are held at once."""


def tree_chosen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor | None,
    pool_k: Tensor,
    pool_v: Tensor,
    pool_index: Tensor,
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
) -> Tensor:
    append(k, v, pool_k, pool_v, write_index)
    append_index(index_k, pool_index, write_index)
    kept_pages = page_table
    pool_k, pool_v, page_table = stored(pool_k, pool_v, kept_pages, write_index)
    pool_index = stored(pool_index, pool_index, kept_pages, write_index)[0]
    page_size = pool_k.shape[2]

    out = empty_output(q, v)
    bounds, pages = node_offsets.tolist(), page_table.tolist()
    out[:, :, : bounds[0]] = 0
    out[:, :, bounds[-1] :] = 0
    for r, (prefix, nodes) in enumerate(zip(prefix_lens.tolist(), tree_lens.tolist(), strict=True)):
        if bounds[r] == bounds[r + 1]:
            continue
        used = pages[r][: -(-(prefix + nodes) // page_size)]
        keys, values, index = (tokens(pool, used, prefix + nodes) for pool in (pool_k, pool_v, pool_index))
        step = max(1, MOST // (index.shape[1] * index_q.shape[2]))
        for at in range(bounds[r], bounds[r + 1], step):
            rows = slice(at, min(at + step, bounds[r + 1]))
            path = ancestors[rows]
            if not ancestors.shape[1]:  # a chain: rows further on are nodes of their own
                ends = bounds[r + 1] - rows.stop
                seen = visible(positions[rows], path, prefix, nodes - ends, 0)
                seen = F.pad(seen, (0, ends))
            else:
                seen = visible(positions[rows], path, prefix, nodes, 0)
            weights = None if index_weights is None else index_weights[0, rows]
            s = index_scores(index_q[0, rows], index[0], weights, index_scale).transpose(0, 1)  # [C, n, S]
            kept = torch.stack([_kept(own, seen, chosen, block, local) for own in s])
            out[0, :, rows] = _attended(q[0, :, rows], keys, values, kept, scale)
    return out


def _kept(s: Tensor, seen: Tensor, chosen: int, block: int, local: int) -> Tensor:
    """Which keys each node sees, of one choice: s [n, S], seen [n, S] -> [n, S]."""
    kept = seen.clone()
    lengths = seen.sum(1)
    alone = (lengths > chosen * block).nonzero().flatten()  # the others see all of their path
    if block == 1 and len(alone):
        best, places = s[alone].masked_fill(~seen[alone], -torch.inf).topk(chosen + 1, 1)
        clear = best[:, chosen - 1] > best[:, chosen]
        sure, where = alone[clear], places[clear, :chosen]
        kept[sure] = torch.zeros_like(kept[sure]).scatter_(1, where, True)
        alone = alone[~clear]
    for i in alone.tolist():
        path = seen[i].nonzero().flatten()
        kept[i, path] = chosen_keys(s[i, path][None], chosen, block, local)[0]
    return kept


def _attended(q: Tensor, keys: Tensor, values: Tensor, kept: Tensor, scale: float) -> Tensor:
    """q [Hq, n, Dk], keys [Hkv, S, Dk], values [Hkv, S, Dv], kept [C, n, S] -> [Hq, n, Dv]; softmax in float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups, heads = keys.shape[0], q.shape[0]
    s = (q.to(wide).reshape(groups, -1, q.shape[2]) @ keys.to(wide).transpose(1, 2) * scale).reshape(
        heads, *kept.shape[1:]
    )
    hidden = ~kept.repeat_interleave(heads // kept.shape[0], 0)
    weights = s.masked_fill(hidden, -torch.inf).softmax(-1).reshape(groups, -1, s.shape[2])
    return (weights @ values.to(wide)).reshape(heads, -1, values.shape[2]).to(q.dtype)


TREE_CHOSEN_ATTENTION: OpOverload = implement(ops.tree_chosen_attention, "treespec_aten", tree_chosen_attention)
