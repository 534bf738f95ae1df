"""`treespec::tree_attention`: every new tree node attends to its committed prefix and to its own ancestors.

One op for every decoder: what a model does besides comes in optional arguments, and leaving one out means it does not.

    window, chunk, pattern     which keys of a path are seen, as in `MaskSpec`; 0 and "": all of them
    softcap, slopes, bias,     how scores are changed and weighted, as in `scores`
    sinks
    activation                 what makes weights of scores, as in `scores`: "softmax"
    cos, sin, style, rotary    q and k come before their rotation and are turned as in `rotation`; k is stored turned
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import define
from .private_torch import OpOverload
from .rotation import STYLES, rotate
from .scores import ACTIVATIONS, SOFTMAX, attention_weights, changed_scores
from .specs import MaskSpec

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) pool_k, Tensor(b!) pool_v, Tensor positions, Tensor write_index, "
    "Tensor node_offsets, Tensor page_table, Tensor prefix_lens, Tensor tree_lens, Tensor ancestors, "
    "float scale, SymInt window=0, SymInt chunk=0, float softcap=0.0, Tensor? slopes=None, Tensor? bias=None, "
    'Tensor? sinks=None, Tensor? cos=None, Tensor? sin=None, str style="half", SymInt rotary=0, '
    'str pattern="", str activation="softmax") -> Tensor'
)


def ancestor_nodes(words: Tensor) -> list[int]:
    """Set bits of one row of packed words: a node's ancestors and itself, root first."""
    return [64 * w + b for w, word in enumerate(words.tolist()) for b in range(64) if word >> b & 1]


def seen_nodes(ancestors: Tensor, row: int, node: int) -> list[int]:
    """The nodes that node `node` of its request, row `row` of all, sees: its ancestors and itself, root first."""
    return ancestor_nodes(ancestors[row]) if ancestors.shape[1] else [*range(node + 1)]


def stored(pool_k: Tensor, pool_v: Tensor, page_table: Tensor, write_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pools and page table to read from, after the new nodes' K and V were written.

    A page table without pages (see `TreeMeta`) becomes one with a page that holds the new nodes alone. Rows of no
    request come last then: what their negative indices name is not read.
    """
    if page_table.shape[1]:
        return pool_k, pool_v, page_table
    if page_table.shape[0] != 1:
        raise ValueError(f"got no pages for {page_table.shape[0]} requests, expected one request")
    page_size = pool_k.shape[2]
    page, offset = write_index // page_size, write_index % page_size
    new_k, new_v = (pool[page, :, offset].transpose(0, 1).unsqueeze(0) for pool in (pool_k, pool_v))
    return new_k, new_v, page_table.new_zeros(1, 1)  # [1, Hkv, T, D]


def append(k: Tensor, v: Tensor, pool_k: Tensor, pool_v: Tensor, write_index: Tensor) -> None:
    """Write the new nodes' K and V into the pools, except where `write_index` is negative; shapes as in `reference`.

    NOTE a head's values that are not all finite, in the pool's dtype, are stored as zeros, and its key as NaN. A kernel
    multiplies what a node does not see by 0, and 0 times NaN or infinity is NaN: it would reach siblings, and stay for
    whoever comes after. A key that is not seen is never multiplied; who sees it gets NaN.
    """
    keys, values = k[0].transpose(0, 1).to(pool_k.dtype), v[0].transpose(0, 1).to(pool_v.dtype)  # [T, Hkv, D]
    lost = ~values.isfinite().all(-1, keepdim=True)
    keys, values = keys.masked_fill(lost, torch.nan), values.masked_fill(lost, 0.0)
    somewhere = write_index >= 0
    if not bool(somewhere.all()):
        keys, values, write_index = keys[somewhere], values[somewhere], write_index[somewhere]
    page_size = pool_k.shape[2]
    pages, offsets = write_index // page_size, write_index % page_size
    pool_k[pages, :, offsets] = keys
    pool_v[pages, :, offsets] = values


def seen_tokens(position: int, prefix: int, path: list[int], mask: MaskSpec) -> tuple[list[int], list[int]]:
    """Offsets in its slot of what a node at `position` sees, and their distances; `path`: its ancestors and itself."""
    offsets = [*range(prefix), *(prefix + j for j in path)]
    distances = [*range(position, position - prefix, -1), *range(len(path) - 1, -1, -1)]
    here, there = torch.tensor(position), torch.tensor([position - d for d in distances], dtype=torch.int64)
    kept = mask.visible(here, there).nonzero().flatten().tolist()
    return [offsets[i] for i in kept], [distances[i] for i in kept]


def reference(
    q: Tensor,  # [1, Hq, T, Dk]
    k: Tensor,  # [1, Hkv, T, Dk]
    v: Tensor,  # [1, Hkv, T, Dv]
    pool_k: Tensor,  # [pages, Hkv, page_size, Dk], written
    pool_v: Tensor,  # [pages, Hkv, page_size, Dv], written
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
    slopes: Tensor | None = None,  # [Hq]
    bias: Tensor | None = None,  # [Hq, distances], or [T, Hq, distances]: each node has its own
    sinks: Tensor | None = None,  # [Hq]
    cos: Tensor | None = None,  # [T, rotary] or [T, rotary / 2], and so is sin
    sin: Tensor | None = None,
    style: str = "half",
    rotary: int = 0,
    pattern: str = "",
    activation: str = SOFTMAX,
) -> Tensor:  # [1, Hq, T, Dv], laid out as [1, T, Hq, Dv]
    """Write K and V at `write_index`, then activation(scale * q @ keys) @ values over what each node sees.

    A node at position p sees, of the tokens j < prefix_len and of its ancestors (itself included, of positions p - 1,
    p - 2, ... upwards), those at positions that `MaskSpec(window, None, chunk, pattern)` shows. Rows that belong to no
    request give 0, and their K and V are written nowhere if their write_index is negative. What is not finite at one
    node (see `append`) makes rows NaN that see it, and no others.
    """
    if cos is not None and sin is not None:
        q, k = rotate(q, cos, sin, style, rotary), rotate(k, cos, sin, style, rotary)
    append(k, v, pool_k, pool_v, write_index)
    pool_k, pool_v, page_table = stored(pool_k, pool_v, page_table, write_index)
    page_size, group = pool_k.shape[2], q.shape[1] // k.shape[1]

    out = empty_output(q, v).zero_()
    wide = torch.promote_types(q.dtype, torch.float32)  # softmax in float32, or in float64
    for r in range(prefix_lens.numel()):
        prefix, end = int(prefix_lens[r]), int(node_offsets[r + 1])
        for i in range(int(node_offsets[r]), end):
            path = seen_nodes(ancestors, i, int(tree_lens[r]) - end + i)
            offsets, distances = seen_tokens(int(positions[i]), prefix, path, MaskSpec(window, None, chunk, pattern))
            seen, distance = (torch.tensor(x, device=q.device) for x in (offsets, distances))
            page, offset = page_table[r, seen // page_size], seen % page_size
            keys = pool_k[page, :, offset].repeat_interleave(group, 1).to(wide)  # [seen, Hq, Dk]
            values = pool_v[page, :, offset].repeat_interleave(group, 1).to(wide)  # [seen, Hq, Dv]
            scores = torch.einsum("hd,shd->hs", q[0, :, i].to(wide), keys) * scale
            own = bias[i] if bias is not None and bias.dim() == 3 else bias
            changed = changed_scores(scores, distance, softcap, slopes, own)
            weights = attention_weights(changed, None, sinks, activation)
            out[0, :, i] = torch.einsum("hs,shd->hd", weights, values).to(q.dtype)
    return out


def empty_output(q: Tensor, v: Tensor) -> Tensor:
    """[1, Hq, T, Dv] whose memory is [1, T, Hq, Dv], as scaled_dot_product_attention does."""
    return q.new_empty(1, q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def fake(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    return empty_output(q, v)


tree_attention: OpOverload = define(
    # NOTE a pattern is any text: a call with one is compiled slowly
    "tree_attention",
    SCHEMA,
    reference,
    fake,
    texts={"style": STYLES, "pattern": ("",), "activation": ACTIVATIONS},
)
