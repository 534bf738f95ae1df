"""One call's inputs: the new nodes of several requests, packed side by side."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from ..codegen.gpu.sizes import power_of_two
from ..ir.inputs import INPUTS, TreeMeta
from ..tree import WORD_BITS, TokenTree
from .cache import TreeCache


@dataclass(frozen=True, slots=True)
class Part:
    """New nodes `start ..` of one slot's tree."""

    slot: int
    tree: TokenTree
    start: int = 0
    chain: bool = False
    """Whether the tree is known to be a chain: where all of a call's are, `TreeMeta` needs no words."""
    pages: int = 1
    """0: a prompt into an empty slot, alone in its call, for which `TreeMeta` needs no pages either."""

    @classmethod
    def prompt(cls, slot: int, tokens: Sequence[int], pages: int = 1) -> Part:
        """Tokens in a row."""
        return cls(slot, TokenTree._trusted(tokens, range(-1, len(tokens) - 1)), chain=True, pages=pages)


@dataclass(frozen=True, slots=True)
class Batch:
    """`tokens` [1, T] and the metadata of T nodes."""

    tokens: Tensor
    meta: TreeMeta

    def named(self) -> dict[str, Tensor]:
        """Every input of `ir.inputs.INPUTS`."""
        return {"tokens": self.tokens, **vars(self.meta)}


@dataclass(frozen=True, slots=True)
class CallSizes:
    """What decides the sizes of a call's inputs."""

    nodes: int
    requests: int
    rows: int
    words: int
    pages: int = 1
    """Of each request."""
    states: int = 0
    """Uncommitted nodes of all requests; 0 also where no program has states."""

    @property
    def _shapes(self) -> dict[str, list[int]]:
        r = self.requests
        sizes = {"T": self.nodes, "requests": r, "requests + 1": r + 1, "rows": self.rows}
        sizes |= {"words": self.words, "slot_pages": self.pages}
        sizes |= {"state_requests": r if self.states else 0, "state_nodes": self.states}
        return {each.name: each.sizes(sizes) for each in INPUTS}

    @property
    def integers(self) -> int:
        """Of all inputs together, aligned."""
        return sum(size + size % 2 for size in map(prod, self._shapes.values()))

    def split(self, flat: Tensor, aligned: bool = False) -> Batch:
        """Views of all integers of a call, in the order of `lay_out`.

        `aligned`: each begins at a multiple of 16 bytes. A GPU's kernels are compiled for that; others would be copied
        first, or have the kernel compiled again.
        """
        shapes = self._shapes
        sizes = [prod(shape) for shape in shapes.values()]
        if aligned:
            sizes = [n for size in sizes for n in (size, size % 2)]
        views = torch.unsafe_split_with_sizes(flat, sizes)[:: 2 if aligned else 1]
        named = {name: view.view(shape) for view, (name, shape) in zip(views, shapes.items(), strict=True)}
        return Batch(named.pop("tokens"), TreeMeta(**named))


def lay_out(
    parts: Sequence[Part],
    cache: TreeCache,
    rows: Sequence[int] | None = None,
    room: CallSizes | None = None,
    aligned: bool = False,
) -> tuple[tuple[int, int, int, int, int, int], array[int]]:
    """The fields of a `CallSizes`, and all integers of the call; `rows` defaults to every new node.

    With `room`, sizes at least as large, the call is padded to it: with nodes that belong to no request and write
    nowhere, requests without nodes, and words without ancestors. Row i is then node i. `aligned` as in
    `CallSizes.split`.
    """
    tokens: list[int] = []
    positions: list[int] = []
    write: list[int] = []
    bits: list[int] = []
    offsets, prefixes, sizes, pages = [0], [], [], list[int]()
    slots: list[int] = []
    stashed: list[int] = []
    words = word_count(parts) if room is None else room.words
    wide = page_count(parts, cache) if room is None else room.pages
    for part in parts:
        tree, start, size = part.tree, part.start, len(part.tree.tokens)
        prefix = cache._lengths[part.slot]
        tokens += tree.tokens[start:]
        positions += [prefix + d for d in tree.depths[start:]]
        table = cache._tables[part.slot]
        if len(table) == 1:
            base = table[0] * cache.page_size + prefix
            write += range(base + start, base + size)
        else:
            write += cache._places(part.slot, range(start, size))
        if not words:
            pass
        elif words == 1 and size < WORD_BITS:
            bits += tree._ancestor_rows[start:]
        else:
            bits += [_signed(row >> WORD_BITS * w) for row in tree._ancestor_rows[start:] for w in range(words)]
        offsets.append(len(tokens))
        prefixes.append(prefix)
        sizes.append(size)
        pages += table[:wide]
        if len(table) < wide:
            pages += [0] * (wide - len(table))  # not read: no token lies there
        if cache.states is not None:
            slots.append(part.slot)
            stashed += cache._stash_rows(part.slot, size)
    if room is not None:
        more, idle = room.nodes - len(tokens), [0] * (room.requests - len(parts))
        tokens += [0] * more
        positions += [0] * more
        write += [-1] * more
        bits += [0] * (more * words)
        offsets += [offsets[-1]] * len(idle)
        prefixes += idle
        sizes += idle
        pages += idle * wide
    count, requests = len(tokens), len(sizes)
    chosen: Sequence[int] = range(count) if rows is None else rows
    shape = (count, requests, len(chosen), words, wide, len(stashed))
    if aligned:
        for field in (tokens, positions, write, offsets, pages, prefixes, sizes, bits, slots, stashed):
            field += [0] * (len(field) % 2)
        chosen = [*chosen, *([0] * (len(chosen) % 2))]
    # One array for all integers, in the order of INPUTS: small tensors would cost more than a small draft's layer.
    numbers = array(
        "q", [*tokens, *positions, *write, *offsets, *pages, *prefixes, *sizes, *chosen, *bits, *slots, *stashed]
    )
    return shape, numbers


def page_count(parts: Sequence[Part], cache: TreeCache) -> int:
    """Pages of the widest table: 0 if no table is needed, else a power of two, so that there are few widths."""
    if not parts[0].pages:
        return 0
    if cache._pages is None:
        return 1
    size = cache.page_size
    return power_of_two(max([-(-(cache._lengths[p.slot] + len(p.tree.tokens)) // size) for p in parts]))


def word_count(parts: Sequence[Part]) -> int:
    """Words of 64 nodes that the largest tree needs; chains need none."""
    if parts[0].chain and all(part.chain for part in parts):
        return 0
    return -(-max([len(part.tree.tokens) for part in parts]) // WORD_BITS)


def _signed(word: int) -> int:
    """The low 64 bits as a signed integer."""
    return ((word & (1 << WORD_BITS) - 1) ^ 1 << WORD_BITS - 1) - (1 << WORD_BITS - 1)


def pack(parts: Sequence[Part], cache: TreeCache, device: torch.device, rows: Sequence[int] | None = None) -> Batch:
    """Build the inputs for these parts; `rows` defaults to every new node."""
    shape, numbers = lay_out(parts, cache, rows, aligned=True)
    flat = torch.frombuffer(numbers, dtype=torch.int64).to(device, non_blocking=True)
    return CallSizes(*shape).split(flat, aligned=True)


class Buffer:
    """The inputs of every call of one shape, in memory that each call writes again.

    NOTE: for the CPU only, where a call has ended when it returns.
    """

    def __init__(self, shape: CallSizes, total: int) -> None:
        numbers = array("q", bytes(8 * total))
        self._memory = memoryview(numbers)
        with torch.inference_mode(False):
            self.batch = shape.split(torch.frombuffer(numbers, dtype=torch.int64))

    def fill(self, numbers: array[int]) -> None:
        self._memory[:] = numbers


def rows_of(parts: Sequence[Part], trees: int) -> tuple[list[int], list[int]]:
    """New nodes of each part, and the rows of logits that are wanted: all of the first `trees` parts, the last of each
    other one."""
    sizes = [len(part.tree) - part.start for part in parts]
    ends = [*accumulate(sizes)]
    nodes = ends[trees - 1] if trees else 0
    return sizes, [*range(nodes), *(end - 1 for end in ends[trees:])]
