"""Rules of the collectives themselves: what goes over the wire comes out whole on every rank."""

from __future__ import annotations

from ..placements import PARTIAL, REPLICATED, Partial, Sharded
from ..rule import Given, Op, Outcome, Rule


def _all_reduce(op: Op, given: Given) -> Outcome | None:
    return Outcome((PARTIAL,), REPLICATED) if isinstance(given[0], Partial) else None


def _all_gather(op: Op, given: Given) -> Outcome | None:
    """The parts of all ranks, one behind the other: replicated, though not yet in the order of the whole."""
    return Outcome((given[0],), REPLICATED) if isinstance(given[0], Sharded) else None


RULES = {
    "_c10d_functional.all_reduce": Rule(_all_reduce),
    "_c10d_functional.all_gather_into_tensor": Rule(_all_gather),
}
