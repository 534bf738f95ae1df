"""Values over more places than there are tokens, of which the tokens' are taken: `table(max(T, 128))[:T]`.

What is computed for each place alone is computed for the places that are taken: the slice moves up to where places are
counted. A table that forward fills for 128 tokens at least is thus one of as many tokens as there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import shape_of
from ..framework.state import GraphState
from ..locality.token_rules import RULES

aten = torch.ops.aten

_MADE = ("aten.full", "aten.ones", "aten.zeros")


class Counted(Exception):
    """A value of which a part cannot be computed by itself."""


def spell_cut_places(state: GraphState, node: fx.Node) -> bool:
    """Rewrite a slice `x[:T]` of the dimension of a maximum of numbers to what is computed of T places."""
    if op_name(node) != "aten.slice" or argument(node, "step") != 1 or argument(node, "start") not in (None, 0):
        return False
    source: Any = node.args[0]
    dim = int(argument(node, "dim")) % len(shape_of(source))
    size, end = shape_of(source)[dim], argument(node, "end")
    if shape_of(node)[dim] != state.length or not isinstance(end, fx.Node) or not _is_maximum(size):
        return False
    try:
        new = _Cut(state, node, end).of(source, dim)
    except Counted:
        return False
    node.replace_all_uses_with(new)
    state.graph.erase_node(node)
    return True


def _is_maximum(size: Any) -> bool:
    return bool(size.free_symbols) and size.func.__name__ == "Max"


class _Cut:
    """Emits the first T places of a value before `at`; T is `end`."""

    def __init__(self, state: GraphState, at: fx.Node, end: fx.Node) -> None:
        self.state, self.at, self.end = state, at, end

    def emit(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.state.call(op, args, kwargs, like=self.at)

    def of(self, node: Any, dim: int) -> fx.Node:
        """The first places of a value in dimension `dim`."""
        if not isinstance(node, fx.Node) or node.op != "call_function" or not isinstance(node.meta["val"], Tensor):
            raise Counted
        name, rank = op_name(node), len(shape_of(node))
        args: list[Any] = list(node.args)
        if name == "aten.arange":
            return self._counted(node)
        if name in _MADE:
            args[0] = [self.end if i == dim else s for i, s in enumerate(args[0])]
        elif RULES.get(name) is RULES["aten.add"]:
            args = [self._operand(a, dim, rank, shape_of(node)[dim]) for a in args]
        elif name in ("aten.unsqueeze", "aten.squeeze", "aten.transpose", "aten.permute"):
            args[0] = self.of(args[0], dimension_before(node, dim))
        elif name == "aten.cat" and int(argument(node, "dim")) % rank != dim:
            args[0] = [self.of(part, dim) for part in args[0]]
        else:
            raise Counted
        return self.emit(node.target, *args, **dict(node.kwargs))

    def _counted(self, node: fx.Node) -> fx.Node:
        """arange from 0 in steps of 1."""
        if argument(node, "start", 0) != 0 or argument(node, "step", 1) != 1:
            raise Counted
        kind = {"dtype": node.meta["val"].dtype, "device": node.meta["val"].device}
        return self.emit(aten.arange.default, self.end, **kind)

    def _operand(self, value: Any, dim: int, rank: int, size: Any) -> Any:
        if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), Tensor):
            return value
        place = dim - (rank - len(shape_of(value)))
        return self.of(value, place) if place >= 0 and shape_of(value)[place] == size else value


def dimension_before(node: fx.Node, dim: int) -> int:
    """Where a dimension was before an op that only moves dimensions; raises Counted where it was none."""
    args: tuple[Any, ...] = node.args
    rank, name = len(shape_of(args[0])), op_name(node)
    order = list(range(rank))
    if name == "aten.unsqueeze":
        order.insert(int(args[1]) % (rank + 1), -1)
    elif name == "aten.squeeze":
        asked: Any = argument(node, "dim")
        gone = {int(d) % rank for d in (asked if isinstance(asked, (list, tuple)) else [asked])}
        order = [d for d in order if d not in gone]
    elif name == "aten.permute":
        order = [int(d) % rank for d in args[1]]
    else:
        i, j = (int(argument(node, which)) % rank for which in ("dim0", "dim1"))
        order[i], order[j] = order[j], order[i]
    if order[dim] < 0:
        raise Counted
    return order[dim]
