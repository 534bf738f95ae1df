"""Rules of ops that work along some dimensions: sums over a cut dimension are partial, anything else needs it whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..placements import PARTIAL, REPLICATED, Partial, Placement, Sharded
from ..rule import Fit, Given, Op, PlacementRule, Want


def _dims(op: Op, name: str) -> set[int]:
    rank = len(op.shapes[0])
    value = op.argument(name)
    if value is None or value == []:
        return set(range(rank))
    return {d % rank for d in ((value,) if isinstance(value, int) else value)}


def _after(op: Op, cut: Sharded, gone: set[int]) -> Sharded:
    """The cut of the result, in which the dimensions `gone` have size 1 or are not there."""
    if len(op.shape) == len(op.shapes[0]):
        return cut
    return cut.moved(cut.dim - sum(d < cut.dim for d in gone))


def _before(op: Op, cut: Sharded, gone: set[int]) -> Sharded | None:
    if len(op.shape) == len(op.shapes[0]):
        return None if cut.dim in gone else cut
    left = [d for d in range(len(op.shapes[0])) if d not in gone]
    return cut.moved(left[cut.dim])


def _fits_reduction(linear: bool) -> Callable[[Op, Given], Fit | None]:
    def fits(op: Op, given: Given) -> Fit | None:
        x, dims = given[0], _dims(op, "dim")
        if isinstance(x, Partial):
            return Fit((x,), x) if linear else None
        if not isinstance(x, Sharded):
            return None
        if x.dim in dims:
            once = all(s.repeat == 1 for s in x.segments)  # what several ranks hold would count several times
            return Fit((x,), PARTIAL) if linear and once else None
        return Fit((x,), _after(op, x, dims))

    return fits


def _wants_reduction(op: Op, cut: Sharded) -> list[Want] | None:
    there = _before(op, cut, _dims(op, "dim"))
    return None if there is None else [Want(0, there)]


def _fits_mean(op: Op, given: Given) -> Fit | None:
    """A mean over a cut dimension is none of the parts' sums: it stays whole (`rewrites` spell it as a sum)."""
    x = given[0]
    if isinstance(x, Sharded) and x.dim in _dims(op, "dim"):
        return None
    return Fit((x,), _after(op, x, _dims(op, "dim")) if isinstance(x, Sharded) else x)


def along(name: str) -> PlacementRule:
    """An op whose results have the operand's shape, or its shape but for the dimension that argument `name` gives."""

    def fits(op: Op, given: Given) -> Fit | None:
        x = given[0]
        if not isinstance(x, Sharded) or x.dim in _dims(op, name):
            return None
        values: Any = op.node.meta["val"]
        gives: Placement | tuple[Placement, ...] = (x,) * len(values) if isinstance(values, (tuple, list)) else x
        return Fit((x, *[REPLICATED] * (len(op.operands) - 1)), gives)

    def wants(op: Op, cut: Sharded) -> list[Want] | None:
        return None if cut.dim in _dims(op, name) else [Want(0, cut)]

    return PlacementRule(fits, wants)


def _fits_norm(op: Op, given: Given) -> Fit | None:
    x = given[0]
    inner = len(op.shapes[0]) - len(op.argument("normalized_shape"))
    if not isinstance(x, Sharded) or x.dim >= inner:
        return None
    return Fit((x, *[REPLICATED] * (len(op.operands) - 1)), x)


def _wants_norm(op: Op, cut: Sharded) -> list[Want] | None:
    inner = len(op.shapes[0]) - len(op.argument("normalized_shape"))
    return [Want(0, cut)] if cut.dim < inner else None


NORM = PlacementRule(_fits_norm, _wants_norm)

RULES = {
    "aten.sum": PlacementRule(_fits_reduction(linear=True), _wants_reduction),
    "aten.mean": PlacementRule(_fits_mean, _wants_reduction),
    **{
        name: PlacementRule(_fits_reduction(linear=False), _wants_reduction)
        for name in ("aten.amax", "aten.amin", "aten.var", "aten.std", "aten.linalg_vector_norm")
    },
    **{
        name: along("dim") for name in ("aten.softmax", "aten._softmax", "aten.log_softmax", "aten.cumsum", "aten.topk")
    },
    "aten.layer_norm": NORM,
    "aten.rms_norm": NORM,
}
