"""Rules of ops that act on each number alone: a cut of one operand is a cut of all that have the dimension."""

from __future__ import annotations

import torch

from treespec_compiler.ir.private_torch import OpOverload

from ..placements import PARTIAL, REPLICATED, Partial, Placement, Sharded
from ..rule import Fit, Given, Op, PlacementRule, Want, named


def _at(op: Op, operand: int, cut: Sharded, dim: int) -> int | None:
    """Which dimension of an operand is dimension `dim` of the result; None where it is the same all along it."""
    own = dim - len(op.shape) + len(op.shapes[operand])
    return None if own < 0 or (op.shapes[operand][own] == 1 and cut.size != 1) else own


def fits(op: Op, given: Given) -> Fit | None:
    """Of a partial sum nothing is known but what linear ops make of it (`LINEAR`)."""
    for operand, cut in enumerate(given):
        if isinstance(cut, Sharded):
            dim = cut.dim + len(op.shape) - len(op.shapes[operand])
            return Fit(_cut(op, cut, dim), cut.moved(dim))
    return None


def _cut(op: Op, cut: Sharded, dim: int) -> tuple[Placement, ...]:
    places = (_at(op, operand, cut, dim) for operand in range(len(op.operands)))
    return tuple(REPLICATED if place is None else cut.moved(place) for place in places)


def wants(op: Op, cut: Sharded) -> list[Want] | None:
    places = [_at(op, operand, cut, cut.dim) for operand in range(len(op.operands))]
    return [Want(operand, cut.moved(place)) for operand, place in enumerate(places) if place is not None]


def _sum(op: Op, given: Given) -> Fit | None:
    """The sum of partial sums is one, if nothing else is added on every rank."""
    if len(op.operands) == 2 and all(isinstance(g, Partial) for g in given):
        return Fit((PARTIAL, PARTIAL), PARTIAL)
    return None if any(isinstance(g, Partial) for g in given) else fits(op, given)


def _scaled(op: Op, given: Given) -> Fit | None:
    """A partial sum times (or through) what every rank has whole."""
    if not any(isinstance(g, Partial) for g in given):
        return fits(op, given)
    first = isinstance(given[0], Partial)
    if op.node.target.overloadpacket.__name__ == "div" and (not first or named(op.node).get("rounding_mode")):
        return None
    rest = given[1:] if first else given[:1]
    if any(g != REPLICATED for g in rest):
        return None
    return Fit(tuple(given), PARTIAL)


def _same(op: Op, given: Given) -> Fit | None:
    return Fit((PARTIAL,), PARTIAL) if isinstance(given[0], Partial) else fits(op, given)


POINTWISE = PlacementRule(fits, wants)
"""Of every op that torch tags so."""

SCALED = PlacementRule(_scaled, wants)
SAME = PlacementRule(_same, wants)

RULES = {
    "aten.add": PlacementRule(_sum, wants),
    "aten.sub": PlacementRule(_sum, wants),
    "aten.mul": SCALED,
    "aten.div": SCALED,
    "aten.neg": SAME,
    "aten.clone": SAME,
    "aten.contiguous": SAME,
    "aten._to_copy": POINTWISE,  # a partial sum in a narrower type would be rounded once a rank
    "aten.to": POINTWISE,
    **{
        f"aten.{name}": POINTWISE
        for name in ("silu", "gelu", "relu", "relu6", "mish", "elu", "selu", "hardtanh", "leaky_relu", "softplus",
                     "square", "type_as", "clamp", "where", "masked_fill", "hardswish", "log_sigmoid", "logaddexp",
                     "zeros_like", "ones_like", "full_like", "floor_divide", "rsub", "celu", "prelu_kernel")
    },
}  # fmt: skip


def is_pointwise(target: object) -> bool:
    """Whether torch says so of an op."""
    return isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags
