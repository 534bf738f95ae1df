"""Which rule an op has: one table, put together of the files of `rules/`."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import fx

from ..forms.form import Shape, shape_of
from .placements import Placement, Sharded
from .rule import Op, PlacementRule, meaning, operands
from .rules import attention, collectives, moves, pointwise, products, reductions, tables

RULES: dict[str, PlacementRule] = {
    **pointwise.RULES,
    **moves.RULES,
    **reductions.RULES,
    **products.RULES,
    **attention.RULES,
    **tables.RULES,
    **collectives.RULES,
}


def rule_of(node: fx.Node) -> PlacementRule | None:
    """None: every operand must be replicated, and so is the result."""
    if node.op != "call_function" or node.target is operator.getitem:
        return None
    found = RULES.get(meaning(node))
    return pointwise.POINTWISE if found is None and pointwise.is_pointwise(node.target) else found


def op_of(node: fx.Node, ranks: int, whole: Mapping[fx.Node, Shape] | None = None) -> Op:
    """A call for its rule. `whole`: whole shapes of nodes of one rank's graph; None: the graph is of whole values."""
    found = list(operands(node))

    def shape(of: fx.Node) -> Shape:
        if whole is not None:
            return whole.get(of, ())
        return shape_of(of) if isinstance(of.meta.get("val"), torch.Tensor) else ()

    names = tuple(name for name, _ in found)
    each = tuple(of for _, of in found)
    return Op(node, ranks, whole is not None, each, names, tuple(map(shape, each)), shape(node))


def whole_shape(node: fx.Node, placement: Placement) -> Shape:
    """The whole shape of a value of one rank's graph, told by its placement."""
    sizes = list(shape_of(node))
    if isinstance(placement, Sharded):
        sizes[placement.dim] = sizes[placement.dim] * 0 + placement.size
    return tuple(sizes)
