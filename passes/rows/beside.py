"""What forward puts beside the tokens: constants joined in front of them, or a padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import shape_of
from ..framework.state import GraphState

_PADS = ("aten.pad", "aten.constant_pad_nd")


@dataclass(frozen=True)
class Beside:
    """What stands beside the tokens: `count` rows, in front of them or behind."""

    length: sympy.Expr
    """How many rows the others stand beside: the tokens,"""
    whole: sympy.Expr
    """and how many there are with them."""
    front: bool

    @property
    def count(self) -> int:
        return int(sympy.simplify(self.whole - self.length))


def found_beside(state: GraphState) -> list[Beside]:
    """What is joined to the tokens, the outermost first."""
    tainted = state.closed_forms().tainted if any(map(joins, state.graph.nodes)) else set()
    found: list[Beside] = []
    for node in state.graph.nodes:
        if not joins(node) or node not in tainted:
            continue
        what = beside_of(state, tainted, node)
        if what is not None and what not in found:
            found.append(what)
    return found[::-1]


def joins(node: fx.Node) -> bool:
    return op_name(node) == "aten.cat" or op_name(node) in _PADS


def beside_of(state: GraphState, tainted: set[fx.Node], node: fx.Node) -> Beside | None:
    found = joined(tainted, node) if op_name(node) == "aten.cat" else padded(node)
    if found is None:
        return None
    source, at, front = found
    length, whole = shape_of(source)[at], shape_of(node)[at]
    if state.length not in length.free_symbols or (front and not sympy.simplify(whole - length).is_Integer):
        return None
    return Beside(length, whole, front)


def joined(tainted: set[fx.Node], node: fx.Node) -> tuple[fx.Node, int, bool] | None:
    """(the tokens' part, the dimension, whether the others come first) of a `cat`."""
    pieces: Any = node.args[0]
    own = [i for i, p in enumerate(pieces) if p in tainted]
    if len(own) != 1 or len(pieces) < 2 or own[0] not in (0, len(pieces) - 1):
        return None
    return pieces[own[0]], int(argument(node, "dim")) % len(shape_of(node)), own[0] != 0


def padded(node: fx.Node) -> tuple[fx.Node, int, bool] | None:
    """The same of a padding with constants."""
    source: Any = node.args[0]
    widths: Any = argument(node, "pad")
    if op_name(node) == "aten.pad" and argument(node, "mode") != "constant":
        return None
    used = [i for i, w in enumerate(widths) if not (isinstance(w, int) and w == 0)]
    if len(used) != 1:
        return None
    at = len(shape_of(node)) - 1 - used[0] // 2
    return (source, at, used[0] % 2 == 0) if at >= 0 else None
