"""One call's inputs: the new nodes of several requests, packed side by side."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.meta import TreeMeta
from ..tree import WORD_BITS, TokenTree
from .cache import TreeCache


@dataclass(frozen=True, slots=True)
class Part:
    """New nodes `start ..` of one slot's tree."""

    slot: int
    tree: TokenTree
    start: int = 0
    prompt: bool = False
    """Whether the tree is a chain, all of it new and alone in its call: `TreeMeta` needs no words for it."""
    pages: int = 1
    """0: a prompt into an empty slot, for which `TreeMeta` needs no pages either."""


@dataclass(frozen=True, slots=True)
class Batch:
    """`tokens` [1, T] and the metadata of T nodes."""

    tokens: Tensor
    meta: TreeMeta


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides the sizes of a call's inputs."""

    nodes: int
    requests: int
    rows: int
    words: int
    pages: int = 1
    """Of each request."""

    @property
    def _sizes(self) -> list[int]:
        t, r = self.nodes, self.requests
        return [t, t, t, r + 1, r * self.pages, r, r, self.rows, t * self.words]

    @property
    def integers(self) -> int:
        """Of all inputs together, aligned."""
        return sum(size + size % 2 for size in self._sizes)

    def split(self, flat: Tensor, aligned: bool = False) -> Batch:
        """Views of all integers of a call, in the order of `lay_out`.

        `aligned`: each begins at a multiple of 16 bytes. A GPU's kernels are compiled for that; others would be copied
        first, or have the kernel compiled again.
        """
        t, r, w = self.nodes, self.requests, self.words
        sizes = [n for size in self._sizes for n in (size, size % 2)] if aligned else self._sizes
        views = torch.unsafe_split_with_sizes(flat, sizes)
        tokens, positions, write_index, node_offsets, page_table, prefix_lens, tree_lens, rows, ancestors = (
            views[::2] if aligned else views
        )
        meta = TreeMeta(
            positions=positions,
            write_index=write_index,
            node_offsets=node_offsets,
            page_table=page_table.view(r, self.pages),
            prefix_lens=prefix_lens,
            tree_lens=tree_lens,
            ancestors=ancestors.view(t, w),
            rows=rows,
        )
        return Batch(tokens.view(1, t), meta)


def lay_out(
    parts: Sequence[Part],
    cache: TreeCache,
    rows: Sequence[int] | None = None,
    room: Shape | None = None,
    aligned: bool = False,
) -> tuple[tuple[int, int, int, int, int], array[int]]:
    """The fields of a `Shape`, and all integers of the call; `rows` defaults to every new node.

    With `room`, a shape at least as large, the call is padded to it: with nodes that belong to no request and write
    nowhere, requests without nodes, and words without ancestors. Row i is then node i. `aligned` as in `Shape.split`.
    """
    tokens: list[int] = []
    positions: list[int] = []
    write: list[int] = []
    bits: list[int] = []
    offsets, prefixes, sizes, pages = [0], [], [], []
    words = word_count(parts) if room is None else room.words
    for part in parts:
        tree, start, size = part.tree, part.start, len(part.tree.tokens)
        prefix = cache._lengths[part.slot]
        tokens += tree.tokens[start:]
        positions += [prefix + d for d in tree.depths[start:]]
        base = part.slot * cache.max_tokens + prefix
        write += range(base + start, base + size)
        if not words:
            pass
        elif words == 1 and size < WORD_BITS:
            bits += tree._ancestor_rows[start:]
        else:
            bits += [_signed(row >> WORD_BITS * w) for row in tree._ancestor_rows[start:] for w in range(words)]
        offsets.append(len(tokens))
        prefixes.append(prefix)
        sizes.append(size)
        pages += [part.slot] * part.pages
    if room is not None:
        more, idle = room.nodes - len(tokens), [0] * (room.requests - len(parts))
        tokens += [0] * more
        positions += [0] * more
        write += [-1] * more
        bits += [0] * (more * words)
        offsets += [offsets[-1]] * len(idle)
        prefixes += idle
        sizes += idle
        pages += idle
    count, requests = len(tokens), len(sizes)
    chosen: Sequence[int] = range(count) if rows is None else rows
    shape = (count, requests, len(chosen), words, len(pages) // requests)
    if aligned:
        for field in (tokens, positions, write, offsets, pages, prefixes, sizes, bits):
            field += [0] * (len(field) % 2)
        chosen = [*chosen, *([0] * (len(chosen) % 2))]
    # One array for all integers: building nine small tensors costs more than a small draft's layer.
    numbers = array("q", [*tokens, *positions, *write, *offsets, *pages, *prefixes, *sizes, *chosen, *bits])
    return shape, numbers


def word_count(parts: Sequence[Part]) -> int:
    """Words of 64 nodes that the largest tree needs; a prompt needs none."""
    if parts[0].prompt:
        return 0
    return -(-max([len(part.tree.tokens) for part in parts]) // WORD_BITS)


def _signed(word: int) -> int:
    """The low 64 bits as a signed integer."""
    return ((word & (1 << WORD_BITS) - 1) ^ 1 << WORD_BITS - 1) - (1 << WORD_BITS - 1)


def pack(parts: Sequence[Part], cache: TreeCache, device: torch.device, rows: Sequence[int] | None = None) -> Batch:
    """Build the inputs for these parts; `rows` defaults to every new node."""
    shape, numbers = lay_out(parts, cache, rows, aligned=True)
    flat = torch.frombuffer(numbers, dtype=torch.int64).to(device, non_blocking=True)
    return Shape(*shape).split(flat, aligned=True)


class Buffer:
    """The inputs of every call of one shape, in memory that each call writes again.

    NOTE: for the CPU only, where a call has ended when it returns.
    """

    def __init__(self, shape: Shape, total: int) -> None:
        numbers = array("q", bytes(8 * total))
        self._memory = memoryview(numbers)
        with torch.inference_mode(False):
            self.batch = shape.split(torch.frombuffer(numbers, dtype=torch.int64))

    def fill(self, numbers: array[int]) -> None:
        self._memory[:] = numbers
