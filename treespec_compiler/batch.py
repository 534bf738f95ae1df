"""One call's inputs: the new nodes of several requests, packed side by side."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import TreeCache
from .ir.meta import TreeMeta
from .tree import WORD_BITS, TokenTree


@dataclass(frozen=True, slots=True)
class Part:
    """New nodes `start ..` of one slot's tree."""

    slot: int
    tree: TokenTree
    start: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """`tokens` [1, T] and the metadata of T nodes."""

    tokens: Tensor
    meta: TreeMeta


def pack(parts: Sequence[Part], cache: TreeCache, device: torch.device, rows: Sequence[int] | None = None) -> Batch:
    """Build the inputs for these parts; `rows` defaults to every new node."""
    tokens: list[int] = []
    positions: list[int] = []
    write: list[int] = []
    offsets, prefixes, sizes, pages = [0], [], [], []
    for part in parts:
        tree, start, size = part.tree, part.start, len(part.tree.tokens)
        prefix = cache.length(part.slot)
        tokens += tree.tokens[start:]
        positions += [prefix + d for d in tree.depths[start:]]
        base = part.slot * cache.max_tokens + prefix
        write += range(base + start, base + size)
        offsets.append(len(tokens))
        prefixes.append(prefix)
        sizes.append(size)
        pages.append(part.slot)
    count = len(tokens)
    chosen = range(count) if rows is None else rows
    # One tensor for all integers, split into views: building eight small tensors costs more than a small draft's layer.
    numbers = array("q", tokens + positions + write + offsets + pages + prefixes + sizes)
    numbers.extend(chosen)
    flat = torch.frombuffer(numbers, dtype=torch.int64)
    if device.type != "cpu":
        flat = flat.to(device, non_blocking=True)
    n = len(parts)
    ids, position, write_index, node_offsets, page_table, prefix_lens, tree_lens, row_index = (
        torch.unsafe_split_with_sizes(flat, [count, count, count, n + 1, n, n, n, len(chosen)])
    )
    words = max(-(-size // WORD_BITS) for size in sizes)
    ancestors = _ancestors(parts, words)
    if device.type != "cpu":
        ancestors = ancestors.to(device, non_blocking=True)
    meta = TreeMeta(
        positions=position,
        write_index=write_index,
        node_offsets=node_offsets,
        page_table=page_table.view(n, 1),
        prefix_lens=prefix_lens,
        tree_lens=tree_lens,
        ancestors=ancestors,
        rows=row_index,
    )
    return Batch(ids.view(1, count), meta)


def _ancestors(parts: Sequence[Part], words: int) -> Tensor:
    if len(parts) == 1:
        packed = parts[0].tree.ancestors(words)
        return packed[parts[0].start :] if parts[0].start else packed
    return torch.cat([p.tree.ancestors(words)[p.start :] for p in parts])
