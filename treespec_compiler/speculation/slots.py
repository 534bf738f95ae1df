"""A request's place in tree caches: taken when it begins, given back when it ends."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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


_IDLE: weakref.WeakKeyDictionary[TreeProgram, list[tuple[TreeCache, int]]] = weakref.WeakKeyDictionary()


def take(program: TreeProgram, max_tokens: int) -> Slot:
    """An empty slot for at least `max_tokens`, exclusively the caller's until given back."""
    idle = _IDLE.setdefault(program, [])
    while idle:
        cache, index = idle.pop()
        if cache.max_tokens >= max_tokens and not cache.stale:
            return Slot(program, cache, index)
    share(program, max_tokens, 1)
    return Slot(program, *_IDLE[program].pop())


def share(program: TreeProgram, max_tokens: int, slots: int) -> None:
    """Make one cache for the next `slots` requests: what they want run at the same time is packed into one forest."""
    cache = program.new_cache(max_tokens=-(-max_tokens // GRANULE) * GRANULE, slots=slots)
    _IDLE.setdefault(program, []).extend((cache, index) for index in reversed(range(slots)))


def give_back(slot: Slot) -> None:
    """Free the slot; it waits for the next `take`."""
    slot.cache.free(slot.index)
    idle = _IDLE.setdefault(slot.program, [])
    kept = {id(cache) for cache, _ in idle}
    if len(kept) < MAX_IDLE or id(slot.cache) in kept:
        idle.append((slot.cache, slot.index))
