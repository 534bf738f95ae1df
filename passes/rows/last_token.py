"""The place where a model goes on with its last token alone: `x[:, -1]`, `x[:, [-1]]`, `x[:, -1:]`, `x[:, T - 1]`."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor, fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.by_value import SampledValues, proved_up_to
from ..forms.closed_form import ClosedForms, shape_of
from ..framework.state import GraphState


def last_token_only(state: GraphState) -> tuple[dict[fx.Node, int], set[fx.Node]] | None:
    """(picks of the last token with the dimension they pick along, nodes between them and the logits), or None.

    Everything that the logits have of the tokens goes through such a pick, and nothing else that depends on their
    number takes part: the logits are one function of one token's values.
    """
    forms = state.closed_forms()
    picks: dict[fx.Node, int] = {}
    tail: set[fx.Node] = set()
    stack = [state.logits]
    while stack:
        node = stack.pop()
        if node in tail or node in picks:
            continue
        along = _picked(state, forms, node)
        if along is not None:
            picks[node] = along
            continue
        if node not in forms.tainted:
            if node in forms.counting:
                return None
            continue
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor) or _counts(state, node):
            return None
        tail.add(node)
        stack.extend(node.all_input_nodes)
    return (picks, tail) if picks else None


def _counts(state: GraphState, node: fx.Node) -> bool:
    return any(state.length in sympy.sympify(s).free_symbols for s in shape_of(node))


def _picked(state: GraphState, forms: ClosedForms, node: fx.Node) -> int | None:
    """The dimension of the source along which a node is the entry of the last token."""
    name = op_name(node)
    if name not in _PICKS or _counts(state, node):
        return None
    source: Any = node.args[0]
    at = [i for i, s in enumerate(shape_of(source)) if s == state.length]
    if len(at) != 1 or source not in forms.tainted:
        return None
    place = _PICKS[name](state, forms, node, at[0])
    return at[0] if place is not None and sympy.expand(place - state.length + 1) == 0 else None


def _place(state: GraphState, value: Any) -> sympy.Expr | None:
    """A place along the tokens, counted from the first one."""
    found = value.meta.get("val") if isinstance(value, fx.Node) else value
    if isinstance(found, torch.SymInt):
        return found.node.expr
    if not isinstance(found, int):
        return None
    return state.length + found if found < 0 else sympy.Integer(found)


def _slice(state: GraphState, forms: ClosedForms, node: fx.Node, at: int) -> sympy.Expr | None:
    source: Any = node.args[0]
    same = int(argument(node, "dim")) % len(shape_of(source)) == at
    return _place(state, argument(node, "start")) if same and shape_of(node)[at] == 1 else None


def _select(state: GraphState, forms: ClosedForms, node: fx.Node, at: int) -> sympy.Expr | None:
    source: Any = node.args[0]
    return _place(state, node.args[2]) if int(node.args[1]) % len(shape_of(source)) == at else None


def _constant_place(state: GraphState, forms: ClosedForms, index: Any) -> sympy.Expr | None:
    if not isinstance(index, fx.Node) or index in forms.tainted or any(s != 1 for s in shape_of(index)):
        return None
    form = forms.of(index)
    if form is None or form.is_bool:
        return _last_by_value(state, index)
    return state.length + form.expr if form.expr.is_negative else form.expr


def _last_by_value(state: GraphState, index: fx.Node) -> sympy.Expr | None:
    """T - 1 where that is the value for every number of tokens, whatever computes it."""
    sampled = SampledValues(index, state.gm, state.tokens, state.constants, state.max_context)

    def holds(n: int) -> bool:
        value = sampled.values(n).whole(index)
        return value.dtype is torch.int64 and int(value) in (n - 1, -1)

    return state.length - 1 if proved_up_to(sampled, holds) >= sampled.ceiling else None


def _index_select(state: GraphState, forms: ClosedForms, node: fx.Node, at: int) -> sympy.Expr | None:
    source: Any = node.args[0]
    same = int(node.args[1]) % len(shape_of(source)) == at
    return _constant_place(state, forms, node.args[2]) if same else None


def _index(state: GraphState, forms: ClosedForms, node: fx.Node, at: int) -> sympy.Expr | None:
    """Indices side by side: the tokens', and 0 in dimensions of one entry."""
    source, indices = node.args[:2]
    used = [i for i, x in enumerate(indices) if x is not None]
    if at not in used or used != list(range(used[0], used[-1] + 1)):
        return None
    if any(shape_of(source)[i] != 1 for i in used if i != at):
        return None
    return _constant_place(state, forms, indices[at])


_PICKS = {
    "aten.slice": _slice,
    "aten.select": _select,
    "aten.index": _index,
    "aten.index_select": _index_select,
}
