"""What the ways to write an indexer's choice share: how scores are hidden, counted and read through casts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import ClosedForms, shape_of
from ..forms.form import Shape
from ..framework.state import GraphState

aten = torch.ops.aten


class ChoiceParts:
    """Reads parts of a choice. Nodes that it makes, in front of `at`, are dead code if the attempt fails."""

    def __init__(self, state: GraphState, forms: ClosedForms, at: fx.Node) -> None:
        self.state, self.forms, self.at = state, forms, at

    def depends(self, node: Any) -> bool:
        """Whether it is computed from what the tokens say."""
        return isinstance(node, fx.Node) and node in self.forms.tainted

    def emit(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.state.call(op, args, kwargs, like=self.at)

    def hidden_behind(self, node: Any, shape: Shape) -> tuple[fx.Node, fx.Node] | None:
        """Scores of this shape that are minus infinity where a mask of positions hides, and where it does not."""
        if op_name(node) != "aten.masked_fill" or argument(node, "value") != -math.inf or shape_of(node) != shape:
            return None
        hidden = argument(node, "mask")
        if self.depends(hidden):
            return None
        return argument(node, "self"), self.emit(aten.logical_not.default, hidden)


def behind(node: Any, *names: str, until: Callable[[fx.Node], bool] = lambda node: False) -> Any:
    """What these ops, which move or widen numbers alone, were given."""
    while op_name(node) in names and not until(node):
        before = node.args[0]
        if op_name(node) == "aten._to_copy" and not _widens(before, node):
            break
        node = before
    return node


def _widens(before: fx.Node, after: fx.Node) -> bool:
    a, b = before.meta["val"].dtype, after.meta["val"].dtype
    return a.is_floating_point and b.is_floating_point and torch.promote_types(a, b) == b


def at_most(count: Any, there: sympy.Expr) -> int | None:
    """n of min(n, there)."""
    expr = expression(count)
    if not isinstance(expr, sympy.Basic) or expr.func.__name__ != "Min" or there not in expr.args:
        return None
    numbers = [int(a) for a in expr.args if a != there and a.is_Integer]
    return numbers[0] if len(numbers) == 1 == len(expr.args) - 1 else None


def expression(count: Any) -> Any:
    """Of a number that a graph computes from sizes; what is no such number is left as it is."""
    value = count.meta["val"] if isinstance(count, fx.Node) else count
    return value.node.expr if isinstance(value, torch.SymInt) else value


def topk_of(node: Any, part: int) -> fx.Node | None:
    """The aten.topk of the largest along the last dimension whose values (0) or places (1) this is."""
    if op_name(node) != "getitem" or node.args[1] != part:
        return None
    topk: Any = node.args[0]
    if op_name(topk) != "aten.topk" or not argument(topk, "largest"):
        return None
    return topk if argument(topk, "dim") in (-1, len(shape_of(node)) - 1) else None


def scaled(node: Any) -> tuple[Any, float]:
    """(x, number) of x * number."""
    if op_name(node) == "aten.mul" and isinstance(node.args[1], (int, float)):
        return node.args[0], float(node.args[1])
    return node, 1.0
