"""Rules of matrix products: a weight cut by outputs cuts the result, one cut by inputs leaves a partial sum."""

from __future__ import annotations

from ..placements import PARTIAL, REPLICATED, Partial, Placement, Sharded
from ..rule import Fit, Given, Op, PlacementRule, Want


def weighted(x: str, weight: str, outputs: int, inputs: int, bias: str = "") -> PlacementRule:
    """result[.., n] = sum over k of x[.., k] weight[.. n .. k ..] + bias[n].

    `outputs` and `inputs` are the weight's dimensions n and k.
    """

    def fits(op: Op, given: Given) -> Fit | None:
        left, right = op.first(x, given), op.first(weight, given)
        last = op.rank_of(x) - 1
        if isinstance(left, Sharded) and left.dim == last:
            if any(s.repeat > 1 for s in left.segments):  # what several ranks hold would be summed several times
                return None
            return Fit(op.needs({x: left, weight: left.moved(inputs), bias: PARTIAL}), PARTIAL)
        if isinstance(right, Sharded) and right.dim == outputs:
            table: dict[str, Placement] = {weight: right, bias: right.moved(0)}
            return Fit(op.needs(table), right.moved(len(op.shape) - 1))
        if isinstance(left, Partial) and (not bias or bias not in op.names):
            return Fit(op.needs({x: left}), PARTIAL)
        return None

    def wants(op: Op, cut: Sharded) -> list[Want] | None:
        if cut.dim != len(op.shape) - 1:
            return None
        found = [Want(op.names.index(weight), cut.moved(outputs))]
        return [*found, Want(op.names.index(bias), cut.moved(0))] if bias in op.names else found

    return PlacementRule(fits, wants)


def _fits_matmul(op: Op, given: Given) -> Fit | None:
    (a, b), ranks = given, [len(s) for s in op.shapes]
    if isinstance(a, Sharded) and a.dim == ranks[0] - 1:
        if any(s.repeat > 1 for s in a.segments) or ranks[1] < 2:
            return None
        return Fit((a, a.moved(ranks[1] - 2)), PARTIAL)
    if isinstance(b, Sharded) and b.dim == ranks[1] - 1 and ranks[1] > 1:
        return Fit((REPLICATED, b), b.moved(len(op.shape) - 1))
    if isinstance(a, Sharded) and a.dim == ranks[0] - 2:
        return Fit((a, REPLICATED), a.moved(len(op.shape) - 2))
    for cut, rank in ((a, ranks[0]), (b, ranks[1])):  # a dimension of matrices side by side
        if isinstance(cut, Sharded) and cut.dim < rank - 2:
            dim = cut.dim + len(op.shape) - rank
            return Fit(tuple(_batch(op, i, cut, dim) for i in (0, 1)), cut.moved(dim))
    if isinstance(a, Partial) and b == REPLICATED:
        return Fit((a, b), PARTIAL)
    return None


def _batch(op: Op, operand: int, cut: Sharded, dim: int) -> Placement:
    own = dim - len(op.shape) + len(op.shapes[operand])
    whole = own < 0 or (op.shapes[operand][own] == 1 and cut.size != 1)
    return REPLICATED if whole else cut.moved(own)


def _wants_matmul(op: Op, cut: Sharded) -> list[Want] | None:
    ranks = [len(s) for s in op.shapes]
    if min(ranks) < 2:
        return None
    if cut.dim == len(op.shape) - 1:
        return [Want(1, cut.moved(ranks[1] - 1))]
    if cut.dim == len(op.shape) - 2:
        return [Want(0, cut.moved(ranks[0] - 2))]
    places = [_batch(op, i, cut, cut.dim) for i in (0, 1)]
    return [Want(i, place) for i, place in enumerate(places) if isinstance(place, Sharded)]


MATMUL = PlacementRule(_fits_matmul, _wants_matmul)

WEIGHTED = {
    "aten.linear": ("input", "weight", 0, 1, "bias"),
    "aten.addmm": ("mat1", "mat2", 1, 0, "self"),
    "treespec.packed_linear": ("x", "packed", 0, 1, "bias"),
    "treespec.grouped_linear": ("x", "weight", 1, 2, ""),
    "transformers.grouped_mm_fallback": ("input", "weight", 2, 1, ""),
}
"""Products with a weight: the names of x and weight, the weight's dimensions of outputs and inputs, and the bias."""

PRODUCTS = {
    **{name: how[:2] for name, how in WEIGHTED.items()},
    "aten.matmul": ("self", "other"),
    "aten.mm": ("self", "mat2"),
    "aten.bmm": ("self", "mat2"),
}
"""What may multiply by a weight: the names of x and weight."""

RULES = {
    **{name: weighted(*how) for name, how in WEIGHTED.items()},
    "aten.matmul": MATMUL,
    "aten.mm": MATMUL,
    "aten.bmm": MATMUL,
}
