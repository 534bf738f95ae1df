"""One spelling of the inverse of a permutation: writing 0, 1, 2, ... at its places becomes an argsort.

The numbers written are not positions: they count rows of this call, however the tokens of a tree are numbered.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import shape_of
from ..framework.state import GraphState

aten = torch.ops.aten


def spell_inverse(state: GraphState, node: fx.Node) -> bool:
    """Rewrite `out[p] = arange(n)`, with p a sort's permutation of n, to `argsort(p)`; False when it is not that."""
    found = _written(node)
    if found is None:
        return False
    permutation, numbers = found
    if not is_permutation(permutation) or not _counts_from_zero(numbers):
        return False
    shapes = {shape_of(node), shape_of(permutation), shape_of(numbers)}
    if len(shapes) != 1 or len(shapes.pop()) != 1:
        return False
    inverse = state.call(aten.argsort.default, (permutation,), like=node)
    if node.meta["val"].dtype != torch.int64:
        inverse = state.call(aten._to_copy.default, (inverse,), {"dtype": node.meta["val"].dtype}, like=node)
    node.replace_all_uses_with(inverse)
    state.graph.erase_node(node)
    return True


def _written(node: fx.Node) -> tuple[Any, Any] | None:
    """(places, values) of a write to a 1-D tensor that keeps nothing of it but what is not written."""
    args: Any = node.args
    name = op_name(node)
    if name == "aten.index_put" and len(args[1]) == 1 and not args[3]:
        return args[1][0], args[2]
    if node.target is aten.scatter.src:
        return args[2], args[3]
    return None


def is_permutation(node: Any) -> bool:
    """Whether a 1-D tensor is 0..n-1 in some order: the places of a sort."""
    if not isinstance(node, fx.Node) or node.meta["val"].dim() != 1:
        return False
    if op_name(node) == "aten.argsort":
        return True
    source: Any = node.args[0] if node.args else None
    return node.target is operator.getitem and node.args[1] == 1 and op_name(source) == "aten.sort"


def _counts_from_zero(node: Any) -> bool:
    """arange(n), perhaps cast to another integer type."""
    if not isinstance(node, fx.Node) or node.meta["val"].is_floating_point():
        return False
    if op_name(node) == "aten._to_copy":
        return node.meta["val"].dtype in (torch.int32, torch.int64) and _counts_from_zero(node.args[0])
    if op_name(node) != "aten.arange":
        return False
    return (
        argument(node, "start", 0) == 0
        and argument(node, "step", 1) == 1
        and all(isinstance(s, sympy.Expr) for s in shape_of(node))
    )
