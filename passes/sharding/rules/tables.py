"""Rules of look-ups: the columns of a table may be cut, its rows are all there."""

from __future__ import annotations

from ..placements import Sharded
from ..rule import Fit, Given, Op, PlacementRule, Want


def _fits(op: Op, given: Given) -> Fit | None:
    table = op.first("weight", given)
    if not isinstance(table, Sharded) or table.dim != 1:
        return None
    return Fit(op.needs({"weight": table}), table.moved(len(op.shape) - 1))


def _wants(op: Op, cut: Sharded) -> list[Want] | None:
    return [Want(op.names.index("weight"), cut.moved(1))] if cut.dim == len(op.shape) - 1 else None


RULES = {"aten.embedding": PlacementRule(_fits, _wants)}
