"""`treespec::scored_tree_attention`: tree attention whose scores are changed, or whose mask is more than a window.

For query position i and key position j of one path, with s = scale * q.k:

    s <- softcap * tanh(s / softcap)          (softcap > 0)
    s <- s + slopes[h] * (j - i) + bias[h, i - j]
    key j is seen when the window and `floor(i / chunk) == floor(j / chunk)` allow it
    weights = exp(s) / (sum exp(s) + exp(sinks[h]))

Positions along a path are consecutive, so i - j is a difference of depths inside the tree.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._ops import OpOverload

from .attention import SCHEMA as PLAIN_SCHEMA
from .attention import TAGS, append, empty_output, seen_nodes, stored

SCHEMA = PLAIN_SCHEMA.replace(
    "SymInt window)",
    "SymInt window, SymInt chunk, float softcap, Tensor? slopes, Tensor? bias, Tensor? sinks)",
)


def changed_scores(s: Tensor, distance: Tensor, softcap: float, slopes: Tensor | None, bias: Tensor | None) -> Tensor:
    """Scores [H, ..., S] for distances i - j [..., S]."""
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    shape = (-1,) + (1,) * distance.dim()
    if slopes is not None:
        s = s - slopes.to(s.dtype).view(shape) * distance
    if bias is not None:
        s = s + bias.to(s.dtype)[:, distance.clamp(0, bias.shape[1] - 1)]
    return s


def softmax_with_sinks(s: Tensor, sinks: Tensor | None) -> Tensor:
    """exp(s) / (sum exp(s) + exp(sink)) over the last dimension; s [H, ..., S], sinks [H]."""
    if sinks is None:
        return s.softmax(-1)
    column = sinks.to(s.dtype).view((-1,) + (1,) * (s.dim() - 1)).expand(*s.shape[:-1], 1)
    return torch.cat([s, column], -1).softmax(-1)[..., :-1]


def reference(
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
    """Shapes as in `tree_attention`; slopes [Hq], bias [Hq, distances], sinks [Hq]."""
    append(k, v, pool_k, pool_v, write_index)
    pool_k, pool_v, page_table = stored(pool_k, pool_v, page_table, write_index)
    page_size, group = pool_k.shape[2], q.shape[1] // k.shape[1]

    out = empty_output(q, v).zero_()
    wide = torch.promote_types(q.dtype, torch.float32)
    for r in range(prefix_lens.numel()):
        prefix, end = int(prefix_lens[r]), int(node_offsets[r + 1])
        for i in range(int(node_offsets[r]), end):
            at, path = int(positions[i]), seen_nodes(ancestors, i, int(tree_lens[r]) - end + i)
            where = [*range(prefix), *(prefix + j for j in path)]  # offsets in the slot
            position = [*range(prefix), *range(at - len(path) + 1, at + 1)]
            keep = [
                n
                for n, j in enumerate(position)
                if (not window or at - j < window) and (not chunk or at // chunk == j // chunk)
            ]
            seen = torch.tensor([where[n] for n in keep], device=q.device)
            distance = torch.tensor([at - position[n] for n in keep], device=q.device)
            page, offset = page_table[r, seen // page_size], seen % page_size
            keys = pool_k[page, :, offset].repeat_interleave(group, 1).to(wide)  # [seen, Hq, Dk]
            values = pool_v[page, :, offset].repeat_interleave(group, 1).to(wide)
            s = torch.einsum("hd,shd->hs", q[0, :, i].to(wide), keys) * scale
            weights = softmax_with_sinks(changed_scores(s, distance, softcap, slopes, bias), sinks)
            out[0, :, i] = torch.einsum("hs,shd->hd", weights, values).to(q.dtype)
    return out


def fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return empty_output(q, v)


_library = torch.library.Library("treespec", "FRAGMENT")
_library.define("scored_tree_attention" + SCHEMA, tags=TAGS)
_library.impl("scored_tree_attention", reference, "CompositeExplicitAutograd")
torch.library.register_fake("treespec::scored_tree_attention", fake, lib=_library)

scored_tree_attention: OpOverload = torch.ops.treespec.scored_tree_attention.default
