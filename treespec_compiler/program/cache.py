"""The tree KV cache: committed tokens of every slot, and one uncommitted tree behind each.

Tokens 0 .. length-1 of a slot are committed; the uncommitted tree's node j lies at length + j. Where offset n lies in
the pools is said by the slot's table of pages: on page `table[n // page_size]`, at `n % page_size`. Without `page_size`
a slot is one page of its own, which grows with what lies in it; with it, slots take pages as they grow, and share what
they have in common (`pages.Pages`). A decoder with states (`states.StatePools`) shares whole pages up to a border at
which a state was kept (`checkpoints.Checkpoints`): a state is of all its tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CacheOverflow, InvalidPath, OutOfPages, StaleCache, UnknownSlot
from ..ir.specs import AttentionSpec, StateSpec
from ..tree import TokenTree
from .checkpoints import Checkpoints, KeptStates
from .pages import FIRST, PageCounts, Pages
from .states import StatePools

# Tokens of a slot's page to begin with, where it is one page of its own; a full one is made twice as long.
FIRST_PAGE = 4096


class TreeCache:
    """K/V pools of a tree program and what lies in them. Made by `TreeProgram.new_cache`.

    `page_size` tokens make a page, of which there are `pages`. Bytes: their product times the sum of the sites'
    `bytes_per_token()`, and what `states` take.
    """

    def __init__(
        self,
        sites: Sequence[AttentionSpec],
        max_tokens: int,
        slots: int,
        device: torch.device,
        commit_kernel: Callable[[Sequence[Tensor], Tensor, Tensor], Any],
        page_size: int | None = None,
        pages: int | None = None,
        states: Sequence[StateSpec] = (),
    ) -> None:
        self.max_tokens, self.slots = max_tokens, slots
        self.stale: str | None = None
        self.prepared: dict[Any, Any] = {}
        """Inputs of calls of a shape, kept by executors."""
        self._commit = commit_kernel
        self._lengths = [0] * slots
        self._trees: list[TokenTree | None] = [None] * slots
        self._outdated: dict[int, str] = {}  # slot -> why its K/V are not what the model would compute now
        self.page_size = min(max_tokens, FIRST_PAGE) if page_size is None else page_size
        self._pages: Pages | None = None
        self._tables = [[slot] for slot in range(slots)]
        self.checkpoints = Checkpoints(slots)
        self._parted = [0] * slots  # with states: at how many tokens others were seen to go on
        if page_size is not None:
            count = slots * -(-max_tokens // page_size) if pages is None else pages
            self._pages = Pages(count, page_size, self.checkpoints.drop)
            self._tables = [[] for _ in range(slots)]
            self._tokens: list[list[int]] = [[] for _ in range(slots)]  # committed ones, for the blocks they make
            self._known = [0] * slots  # pages of each slot that are known
        count = slots if self._pages is None else self._pages.count
        self.storages, self.pools = _allocate(sites, self.page_size, count, device)
        self._sites = sites
        self._device = device
        self.states = StatePools(states, slots, device) if states else None

    def length(self, slot: int = 0) -> int:
        """Committed tokens of the slot."""
        return self._lengths[self._check_slot(slot)]

    def uncommitted(self, slot: int = 0) -> TokenTree | None:
        """The tree behind the committed tokens, if any."""
        return self._trees[self._check_slot(slot)]

    @property
    def bytes(self) -> int:
        states = 0 if self.states is None else self.states.bytes
        states += self.checkpoints.bytes
        return states + sum(s.numel() * s.element_size() for s in self.storages)

    @property
    def page_counts(self) -> PageCounts:
        """What the pages are used for; without `page_size` every slot has one."""
        if self._pages is None:
            held = sum(length > 0 or tree is not None for length, tree in zip(self._lengths, self._trees, strict=True))
            return PageCounts(self.slots, held, 0, 0)
        return self._pages.counts

    def lacking(self, slot: int, tokens: int) -> int:
        """Pages to be taken before the slot can hold `tokens` tokens and nodes behind its committed ones."""
        if self._pages is None:
            return 0
        length, table = self._lengths[slot], self._tables[slot]
        new = max(0, -(-(length + tokens) // self.page_size) - len(table))
        return new + (tokens > 0 and self._shared_end(slot))

    def shared_with(self, tokens: Sequence[int]) -> int:
        """Pages, of those that a slot with these tokens needs, that others hold and it would share (`adopt`)."""
        if self._pages is None:
            return 0
        return sum(
            self._pages.holders(page) > 0 for page in self._resumable(self._pages.beginning(tokens, len(tokens) - 1))
        )

    def commit(self, path: Sequence[int] | Mapping[int, Sequence[int]]) -> None:
        """Keep the K/V of these nodes and drop every other uncommitted node.

        `path`: node indices of slot 0's tree, root first; or {slot: path}, where slots that are not named keep their
        trees. `[]` keeps nothing. A path may be an integer tensor [n]. Raises InvalidPath, before anything is changed.
        """
        given = path if isinstance(path, (dict, Mapping)) else {0: path}  # a dict is known at once
        paths = {self._check_slot(slot): _nodes(nodes) for slot, nodes in given.items()}
        self._check_fresh(paths)
        for slot, nodes in paths.items():
            self._check_path(slot, nodes)
        src: list[int] = []
        dst: list[int] = []
        for slot in sorted(paths):
            moved = [(node, target) for target, node in enumerate(paths[slot]) if node != target]
            if moved:
                src += self._places(slot, [node for node, _ in moved])
                dst += self._places(slot, [target for _, target in moved])
        if src and self.storages:
            moves = torch.tensor([src, dst]).to(self._device, non_blocking=True)
            self._commit(self.storages, moves[0], moves[1])
        for slot, nodes in paths.items():
            tree = self._trees[slot]
            self._append(slot, [tree.tokens[node] for node in nodes] if tree is not None else [], nodes)

    def adopt(self, slot: int, tokens: Sequence[int]) -> int:
        """Begin an empty slot with the pages of other slots that begin with the same tokens; full ones of former slots
        too. A page that is not full is copied as soon as one of the slots writes to it.

        How many of `tokens` are committed by that: never the last one, whose logits somebody wants. Always 0 without
        `page_size`. In a decoder with states: up to the last page behind which a state was kept.
        """
        self._check_fresh([self._check_slot(slot)])
        pages, table = self._pages, self._tables[slot]
        if pages is None or self._lengths[slot] or table:
            return 0
        size, most = self.page_size, min(len(tokens) - 1, self.max_tokens)
        known = pages.beginning(tokens, most)
        for page in self._resumable(known):
            pages.hold(page)
            table.append(page)
        found = len(table) * size
        self._known[slot] = len(table)
        page, more = 0, 0
        if self.states is None:
            page, more = self._begun(table, tokens[found : min(most, found + size)])
        elif table:
            self.states.restore(slot, self.checkpoints.find(pages.serial(table[-1])))
        self._parted[slot] = len(known) * size
        if more:
            pages.hold(page)
            table.append(page)
        self._lengths[slot] = found + more
        self._tokens[slot] = [*tokens[: found + more]]
        return found + more

    def _resumable(self, pages: list[int]) -> list[int]:
        """Those of these pages, the first of a text, behind which a slot can go on."""
        assert self._pages is not None
        while self.states is not None and pages and not self.checkpoints.has(self._pages.serial(pages[-1])):
            pages = pages[:-1]
        return pages

    def _begun(self, table: Sequence[int], tokens: Sequence[int]) -> tuple[int, int]:
        """Of the pages that slots have behind the pages of `table`, one with most of `tokens` at its beginning, and how
        many. NOTE equal blocks are one page, so slots with the same beginning name the same pages.
        """
        best, start = (0, 0), len(table) * self.page_size
        for other, pages in enumerate(self._tables):
            if len(pages) > len(table) and pages[: len(table)] == table and other not in self._outdated:
                text = self._tokens[other][start : start + len(tokens)]
                same = next((i for i, (a, b) in enumerate(zip(text, tokens)) if a != b), min(len(text), len(tokens)))
                if same > best[1]:
                    best = pages[len(table)], same
        return best

    def free(self, slot: int = 0) -> None:
        """Forget the slot's tokens; its memory is used again."""
        self._check_slot(slot)
        self._lengths[slot] = 0
        self._trees[slot] = None
        self._outdated.pop(slot, None)
        if self.states is not None:
            self.states.drop(slot)
            self.checkpoints.leave(slot)
            self._parted[slot] = 0
        if self._pages is not None:
            self._give_up(slot, 0)
            self._tokens[slot], self._known[slot] = [], 0

    def forget(self) -> None:
        """What former slots left in pages is not found any more by those that begin alike."""
        if self._pages is not None:
            self._pages.forget_idle()

    def _append(self, slot: int, tokens: Sequence[int], nodes: Sequence[int] | None = None) -> None:
        """These tokens are committed: their K/V lie behind the others, and nothing behind them counts.

        They were these nodes of the slot's last call; None: the first ones, in a row.
        """
        kept: list[tuple[int, KeptStates]] = []
        if self.states is not None:
            path = range(len(tokens)) if nodes is None else nodes
            # NOTE whoever has the same prompt runs its last token: a state behind that is of no use to it.
            kept = self._move_state(slot, path, self._lengths[slot] + len(path) - (nodes is None))
        self._lengths[slot] += len(tokens)
        self._trees[slot] = None
        if self._pages is None:
            return
        size, table, held = self.page_size, self._tables[slot], self._tokens[slot]
        held += tokens
        self._give_up(slot, -(-self._lengths[slot] // size))
        while (self._known[slot] + 1) * size <= self._lengths[slot] and slot not in self._outdated:
            at = self._known[slot]
            before = self._pages.serial(table[at - 1]) if at else FIRST
            # NOTE two slots that ran the same tokens at the same time keep one of their pages from here on.
            table[at] = self._pages.know(table[at], before, held[at * size : (at + 1) * size])
            self._known[slot] = at + 1
        for border, snapshot in kept:
            serial = self._pages.serial(table[border // size - 1])
            self.checkpoints.keep(serial, snapshot, slot, nodes is None, border == self._parted[slot])

    def _move_state(self, slot: int, path: Sequence[int], last: int) -> list[tuple[int, KeptStates]]:
        """By the accepted nodes; (tokens, state behind them) at page borders up to `last` where one is to be kept."""
        assert self.states is not None
        begin, kept = self._lengths[slot], list[tuple[int, KeptStates]]()
        end, done = begin + len(path), begin
        if self._pages is not None and slot not in self._outdated:
            for border in sorted({self._parted[slot], last // self.page_size * self.page_size}):
                if begin < border <= end:
                    self.states.move(slot, path[done - begin : border - begin], first=not done)
                    kept.append((border, self.states.snapshot(slot)))
                    done = border
        self.states.commit(slot, path[done - begin :], first=not done)
        return kept

    def _give_up(self, slot: int, kept: int) -> None:
        """Drop pages behind the first `kept`, the last first: of known ones, beginnings are kept longest."""
        assert self._pages is not None
        table = self._tables[slot]
        while len(table) > kept:
            self._pages.drop(table.pop())

    def _reserve(self, slot: int, nodes: int) -> None:
        """Make room for so many nodes behind the committed tokens."""
        length = self._lengths[slot]
        if length + nodes > self.max_tokens:
            raise CacheOverflow(slot=slot, length=length, new=nodes, capacity=self.max_tokens)
        if self._pages is None:
            if length + nodes > self.page_size:
                self._grow(min(self.max_tokens, max(length + nodes, 2 * self.page_size)))
            return
        pages, table = self._pages, self._tables[slot]
        lacking = self.lacking(slot, nodes)
        if lacking > pages.free:
            raise OutOfPages(wanted=lacking, free=pages.free, total=pages.count, page_size=self.page_size)
        if nodes and length // self.page_size < len(table):
            self._own(slot, length // self.page_size)
        while len(table) * self.page_size < length + nodes:
            table.append(pages.take())

    def _grow(self, tokens: int) -> None:
        """Longer pages with the same tokens in them; whoever holds pools must take the new ones."""
        old = self.storages
        self.storages, self.pools = [], []
        self.prepared.clear()
        # NOTE pools made in inference mode could be written in no other.
        with torch.inference_mode(False), torch.no_grad():
            self.storages, self.pools = _allocate(self._sites, tokens, self.slots, self._device)
            for storage in self.storages:
                storage[..., : self.page_size, :] = old.pop(0)
        self.page_size = tokens

    def _shared_end(self, slot: int) -> bool:
        """Whether the next token goes to a page that another slot holds, too."""
        at, table = self._lengths[slot] // self.page_size, self._tables[slot]
        assert self._pages is not None
        return at < len(table) and self._pages.holders(table[at]) > 1

    def _own(self, slot: int, at: int) -> None:
        """Copy on write: the slot's page becomes one that nobody else holds, and that nobody else can find."""
        assert self._pages is not None
        old = self._tables[slot][at]
        if self._pages.holders(old) == 1:
            self._pages.forget(old)
            return
        new = self._pages.take()
        self._copy_page(old, new)
        self._tables[slot][at] = new
        self._pages.drop(old)

    def _copy_page(self, old: int, new: int) -> None:
        for storage in self.storages:
            storage[:, new].copy_(storage[:, old])

    def _places(self, slot: int, nodes: Sequence[int]) -> list[int]:
        """Where uncommitted nodes lie in the pools, as page * page_size + offset."""
        size, table, length = self.page_size, self._tables[slot], self._lengths[slot]
        if len(table) == 1:
            base = table[0] * size + length
            return [base + node for node in nodes]
        return [table[(length + node) // size] * size + (length + node) % size for node in nodes]

    def _stash_rows(self, slot: int, nodes: int) -> list[int]:
        """Where so many uncommitted nodes of the slot lie in stashes."""
        assert self.states is not None
        rows, grown = self.states.rows(slot, nodes)
        if grown:
            self.prepared.clear()
        return rows

    def _outdate(self, reason: str) -> None:
        """What lies in the slots was computed by other weights; a freed slot is as good as new."""
        for slot in range(self.slots):
            if self._lengths[slot] or self._trees[slot] is not None:
                self._outdated[slot] = reason
        if self._pages is not None:
            self._pages.forget_all()

    def _check_slot(self, slot: int) -> int:
        if not isinstance(slot, int) or not 0 <= slot < self.slots:
            raise UnknownSlot(slot=slot, slots=self.slots)
        return slot

    def _check_fresh(self, slots: Iterable[int]) -> None:
        if self.stale is not None:
            raise StaleCache(reason=self.stale)
        if self._outdated:
            for slot in slots:
                if slot in self._outdated:
                    raise StaleCache(reason=self._outdated[slot])

    def _check_path(self, slot: int, path: Sequence[int]) -> None:
        tree = self._trees[slot]
        if not path:
            return
        if tree is None:
            raise InvalidPath(got=f"path {list(path)} for slot {slot}", expected="[]: the slot has no uncommitted tree")
        parent = -1
        for node in path:
            if not isinstance(node, int) or not 0 <= node < len(tree):
                raise InvalidPath(got=f"node {node!r}", expected=f"indices from 0 to {len(tree) - 1}")
            if tree.parents[node] != parent:
                raise InvalidPath(
                    got=f"node {node} after {parent if parent >= 0 else 'the prefix'} in {list(path)}",
                    expected=f"its parent, {tree.parents[node]}, before it",
                )
            parent = node


def _nodes(path: Sequence[int] | Tensor) -> list[int]:
    """NOTE the truth of a tensor is that of its number: an unconverted `tensor([0])` would pass for an empty path."""
    if not isinstance(path, Tensor):
        return [_whole(node) for node in path]
    if path.dim() != 1 or path.is_floating_point() or path.is_complex() or path.dtype is torch.bool:
        got = f"a {str(path.dtype).removeprefix('torch.')} tensor {list(path.shape)}"
        raise InvalidPath(got=got, expected="node indices: integers, or an integer tensor [n]")
    return path.tolist()


def _whole(node: Any) -> Any:
    """An integer of another type, such as numpy's, as Python's; anything else as it is, which is no node."""
    try:
        return operator.index(node)
    except TypeError:
        return node


def _allocate(
    sites: Sequence[AttentionSpec], page_size: int, pages: int, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """One storage [pools, pages, heads, page_size, dim] per distinct shape, and views of it (`AttentionSpec.pools`)."""
    shapes: dict[tuple[int, int, torch.dtype], list[tuple[int, int]]] = {}
    for site in sites:
        for kind, (heads, dim) in enumerate(site.pools):
            shapes.setdefault((heads, dim, site.dtype), []).append((site.index, kind))
    pools: dict[tuple[int, int], Tensor] = {}
    storages = []
    for (heads, dim, dtype), users in shapes.items():
        # NOTE zeros, not empty: a masked key with a NaN in it would still poison a product with weight 0.
        storage = torch.zeros(len(users), pages, heads, page_size, dim, dtype=dtype, device=device)
        storages.append(storage)
        pools.update(zip(users, storage.unbind(0), strict=True))
    return storages, [pools[site.index, kind] for site in sites for kind in range(len(site.pools))]
