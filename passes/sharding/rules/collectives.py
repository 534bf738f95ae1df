"""Rules of the collectives themselves: what goes over the wire comes out whole on every rank."""

from __future__ import annotations

from ..placements import PARTIAL, REPLICATED, Partial, Sharded
from ..rule import Fit, Given, Op, PlacementRule


def _all_reduce(op: Op, given: Given) -> Fit | None:
    return Fit((PARTIAL,), REPLICATED) if isinstance(given[0], Partial) else None


def _all_gather(op: Op, given: Given) -> Fit | None:
    """The parts of all ranks, one behind the other: replicated, though not yet in the order of the whole."""
    return Fit((given[0],), REPLICATED) if isinstance(given[0], Sharded) else None


RULES = {
    "_c10d_functional.all_reduce": PlacementRule(_all_reduce),
    "_c10d_functional.all_gather_into_tensor": PlacementRule(_all_gather),
}
