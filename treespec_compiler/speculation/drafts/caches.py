"""Idle tree caches, kept for the next request of the same program: allocation would cost more than a short prompt."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...program.cache import TreeCache
    from ...program.tree_program import TreeProgram

# Capacities are rounded up so that requests of similar lengths find a cache that fits.
GRANULE = 256
MAX_IDLE = 2
_IDLE: weakref.WeakKeyDictionary[TreeProgram, list[TreeCache]] = weakref.WeakKeyDictionary()


def take(program: TreeProgram, max_tokens: int) -> TreeCache:
    """An empty one-slot cache for at least `max_tokens`, exclusively the caller's until given back."""
    idle = _IDLE.setdefault(program, [])
    while idle:
        cache = idle.pop()
        if cache.max_tokens >= max_tokens and not cache.stale:
            return cache
    return program.new_cache(max_tokens=-(-max_tokens // GRANULE) * GRANULE, slots=1)


def give_back(program: TreeProgram, cache: TreeCache) -> None:
    """Free the slot; the cache waits for the next `take`."""
    cache.free(0)
    idle = _IDLE.setdefault(program, [])
    if len(idle) < MAX_IDLE:
        idle.append(cache)
