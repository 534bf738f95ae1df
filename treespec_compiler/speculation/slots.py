"""A request's places in tree caches: taken when it begins, given back when it ends."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from ..program.cache import TreeCache
    from ..program.tree_program import TreeProgram

# Capacities are rounded up so that requests of similar lengths find a cache that fits.
GRANULE = 256
MAX_IDLE = 2
"""Caches with idle slots that are kept for a program: allocation would cost more than a short prompt."""


@dataclass(frozen=True, eq=False, slots=True)
class Slot:
    """A slot of a cache, and the program that runs on it."""

    program: TreeProgram
    cache: TreeCache
    index: int

    @property
    def length(self) -> int:
        """Committed tokens."""
        return self.cache.length(self.index)

    def commit(self, path: Sequence[int]) -> None:
        self.cache.commit({self.index: path})


class Slots(Protocol):
    """Where slots come from."""

    def take(self, program: TreeProgram, max_tokens: int) -> Slot:
        """An empty slot for at least `max_tokens`, if caches may be as large, exclusively the caller's until given
        back."""
        ...

    def give_back(self, slot: Slot) -> None:
        """Free the slot."""
        ...

    def adopt(self, slot: Slot, tokens: Sequence[int]) -> int:
        """Begin an empty slot with what other slots hold of the same beginning; how many tokens are committed by that,
        never all."""
        ...


class KeptSlots:
    """Slots of caches that are kept for the requests that follow. A slot is memory of its own, sized by its request."""

    def __init__(self) -> None:
        self._idle: weakref.WeakKeyDictionary[TreeProgram, list[tuple[TreeCache, int]]] = weakref.WeakKeyDictionary()

    def take(self, program: TreeProgram, max_tokens: int) -> Slot:
        idle = self._idle.setdefault(program, [])
        while idle:
            cache, index = idle.pop()
            if cache.max_tokens >= max_tokens and not cache.stale:
                return Slot(program, cache, index)
        return Slot(program, program.new_cache(max_tokens=-(-max_tokens // GRANULE) * GRANULE, slots=1), 0)

    def give_back(self, slot: Slot) -> None:
        slot.cache.free(slot.index)
        idle = self._idle.setdefault(slot.program, [])
        if len(idle) < MAX_IDLE:
            idle.append((slot.cache, slot.index))

    def adopt(self, slot: Slot, tokens: Sequence[int]) -> int:
        return 0


KEPT = KeptSlots()


class PagedSlots:
    """Slots of one paged cache a program: `slots` of them, on pages for `tokens` tokens in all.

    A cache that is stale, or has no idle slot left, gets a successor.
    """

    def __init__(self, slots: int, tokens: int, page_size: int) -> None:
        self.slots, self.page_size, self.pages = slots, page_size, -(-tokens // page_size)
        self._idle: dict[TreeProgram, list[int]] = {}
        self._caches: dict[TreeProgram, TreeCache] = {}

    def cache(self, program: TreeProgram) -> TreeCache:
        """The program's cache, made at the first use."""
        cache = self._caches.get(program)
        if cache is None or cache.stale:
            tokens = self.pages * self.page_size
            with torch.inference_mode(False):  # it outlives the mode it happens to be made in
                cache = program.new_cache(tokens, self.slots, page_size=self.page_size, pages=self.pages)
            self._caches[program], self._idle[program] = cache, [*reversed(range(self.slots))]
        return cache

    def take(self, program: TreeProgram, max_tokens: int) -> Slot:
        cache = self.cache(program)
        if not self._idle[program]:
            del self._caches[program]
            cache = self.cache(program)
        return Slot(program, cache, self._idle[program].pop())

    def give_back(self, slot: Slot) -> None:
        slot.cache.free(slot.index)
        if self._caches.get(slot.program) is slot.cache:
            self._idle[slot.program].append(slot.index)

    def adopt(self, slot: Slot, tokens: Sequence[int]) -> int:
        return slot.cache.adopt(slot.index, tokens)

    def forget(self) -> None:
        """New requests find nothing of former ones."""
        for cache in self._caches.values():
            cache.forget()

    def clear(self) -> None:
        """Let the caches go; slots that are out stay valid."""
        self._caches.clear()
