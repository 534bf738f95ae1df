"""The rule of tree attention: heads are independent. Queries are cut by head; keys, values and pools by KV group."""

from __future__ import annotations

from ..placements import Placement, Segment, Sharded
from ..rule import Fit, Given, Op, PlacementRule, Want

BY_HEAD = {"slopes": 0, "bias": 0, "sinks": 0}


def head_cuts(heads: int, groups: int, ranks: int) -> tuple[Sharded, Sharded] | None:
    """How queries [1, heads, T, D] and keys [1, groups, T, D] are cut; None where whole heads cannot be dealt out.

    Ranks that outnumber the groups hold one each, the same on heads / groups ranks in a row.
    """
    repeat = ranks // groups if ranks > groups else 1
    queries = Sharded(1, (Segment(heads),), "head")
    keys = Sharded(1, (Segment(groups, repeat),), "KV group")
    if repeat > 1 and ranks % groups:
        return None
    return (queries, keys) if queries.fits(ranks) and keys.fits(ranks) else None


def _fits(op: Op, given: Given) -> Fit | None:
    if not any(isinstance(op.first(name, given), Sharded) for name in ("q", "k", "v", "pool_k", "pool_v")):
        return None
    shapes = dict(zip(op.names, op.shapes, strict=True))
    cuts = head_cuts(int(shapes["q"][1]), int(shapes["k"][1]), op.ranks)
    if cuts is None:
        return None
    queries, keys = cuts
    table: dict[str, Placement] = {"q": queries, "k": keys, "v": keys, "pool_k": keys, "pool_v": keys}
    by_head = BY_HEAD | ({"bias": 1} if len(shapes.get("bias", ())) == 3 else {})  # [T, Hq, distances]
    table |= {name: queries.moved(dim) for name, dim in by_head.items()}
    if not isinstance(keys, Sharded) or all(s.repeat == op.ranks for s in keys.segments):
        table = {name: place for name, place in table.items() if place != keys}  # one group: every rank holds it
    return Fit(op.needs(table), queries)


def _wants(op: Op, cut: Sharded) -> list[Want] | None:
    shapes = dict(zip(op.names, op.shapes, strict=True))
    cuts = head_cuts(int(shapes["q"][1]), int(shapes["k"][1]), op.ranks)
    if cuts is None or cut != cuts[0]:
        return None
    return wants_of(op, *cuts)


def wants_of(op: Op, queries: Sharded, keys: Sharded) -> list[Want]:
    """The cuts of q, k and v."""
    shared = all(s.repeat == op.ranks for s in keys.segments)
    names = {"q": queries} if shared else {"q": queries, "k": keys, "v": keys}
    return [Want(op.names.index(name), cut) for name, cut in names.items()]


RULES = {"treespec.tree_attention": PlacementRule(_fits, _wants)}
