"""From a softmax to the product with the values: what may happen to attention weights on the way.

Weights may be cast, laid out anew, and set to 0 where a condition holds. What is set to 0 after a softmax is left out
only where it was 0 before: `zeroed` are the conditions, and the mask of the scores must hide every key there. Weights
are never NaN in a decoder, since each query sees itself (`classify` proves it), so what replaces NaN does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import ClosedForms, Form, shape_of
from ..framework.state import GraphState

aten = torch.ops.aten

PRODUCTS = ("aten.matmul", "aten.bmm")
_SAME = ("aten._to_copy", "aten.reshape", "aten.expand")


@dataclass(frozen=True)
class WeightPath:
    """`steps`: every node behind the softmax up to `output`, the product with `values`."""

    values: fx.Node
    output: fx.Node
    steps: tuple[fx.Node, ...] = ()
    dropped: bool = False
    """Whether a last column was cut off."""
    zeroed: tuple[fx.Node, ...] = ()


def follow(state: GraphState, forms: ClosedForms, softmax: fx.Node) -> WeightPath | None:
    """The path of one softmax's weights, or None where they go elsewhere, or to several places."""
    path = WeightPath(softmax, softmax)
    while len(path.output.users) == 1:
        node, user = path.output, next(iter(path.output.users))
        path = replace(path, output=user, steps=(*path.steps, user))
        if op_name(user) in PRODUCTS:
            values: Any = user.args[1]
            return replace(path, values=values) if user.args[0] is node and values in forms.tainted else None
        step = _step(state, forms, node, user, path)
        if step is None:
            return None
        path = step
    return None


def _step(state: GraphState, forms: ClosedForms, node: fx.Node, user: fx.Node, path: WeightPath) -> WeightPath | None:
    name = op_name(user)
    if name == "aten.slice":
        return replace(path, dropped=True) if not path.dropped and _drops_last(user) else None
    if name in _SAME:
        return path if shape_of(node)[-2:] == shape_of(user)[-2:] else None
    if name == "aten.nan_to_num":
        return path if user.args[0] is node else None
    where = zeroing(state, forms, node, user)
    return None if where is None else replace(path, zeroed=(*path.zeroed, where))


def zeroing(state: GraphState, forms: ClosedForms, node: fx.Node, user: fx.Node) -> fx.Node | None:
    """Where `user` sets the weights of `node` to 0; None: it does something else."""
    rule = _ZEROING.get(op_name(user))
    return rule(state, forms, node, user) if rule is not None and shape_of(node) == shape_of(user) else None


def _drops_last(node: fx.Node) -> bool:
    """`x[..., :-1]`."""
    args: Any = node.args
    rank = node.meta["val"].dim()
    return args[1] in (-1, rank - 1) and args[2] in (0, None) and args[3:] == (-1, 1)


def _times(state: GraphState, forms: ClosedForms, node: fx.Node, user: fx.Node) -> fx.Node | None:
    """weights * m for a mask m of zeros and ones."""
    mask: Any = user.args[1] if user.args[0] is node else user.args[0]
    form = forms.of(mask) if isinstance(mask, fx.Node) and mask not in forms.tainted else None
    if form is None or not (form.is_bool or zeros_and_ones(forms, form)):
        return None
    return state.call(aten.eq.Scalar, (mask, 0), like=user)


def _filled(state: GraphState, forms: ClosedForms, node: fx.Node, user: fx.Node) -> fx.Node | None:
    kept, condition, value = user.args[:3]
    return condition if kept is node and _known(forms, condition) and _zero(forms, value) else None


def _where(state: GraphState, forms: ClosedForms, node: fx.Node, user: fx.Node) -> fx.Node | None:
    condition, yes, no = (argument(user, name) for name in ("condition", "self", "other"))
    if not _known(forms, condition):
        return None
    if yes is node and _zero(forms, no):
        return state.call(aten.logical_not.default, (condition,), like=user)
    return condition if no is node and _zero(forms, yes) else None


def _lower(state: GraphState, forms: ClosedForms, node: fx.Node, user: fx.Node) -> fx.Node | None:
    """tril(weights): what lies above the diagonal is set to 0."""
    diagonal, rank = argument(user, "diagonal"), len(shape_of(node))
    if not isinstance(diagonal, int) or rank < 2:
        return None
    sizes = [state.call(aten.sym_size.int, (node, d), like=user) for d in (rank - 2, rank - 1)]
    kind = {"dtype": torch.bool, "device": node.meta["val"].device}
    ones = state.call(aten.ones.default, (sizes,), kind, like=user)
    return state.call(aten.triu.default, (ones, diagonal + 1), like=user)


def _known(forms: ClosedForms, condition: Any) -> bool:
    return isinstance(condition, fx.Node) and condition not in forms.tainted


def _zero(forms: ClosedForms, value: Any) -> bool:
    if isinstance(value, (int, float)):
        return value == 0
    form = forms.of(value) if isinstance(value, fx.Node) and value not in forms.tainted else None
    return form is not None and not form.is_bool and form.expr == 0


def zeros_and_ones(forms: ClosedForms, form: Form) -> bool:
    """Whether every value of a number's form is 0 or 1."""
    if form.expr.is_Piecewise:
        return all(value in (0, 1) for value, _ in form.expr.args)
    if len(form.tables) != 1 or form.expr not in form.tables:
        return False
    table = forms.values(str(form.expr.func))
    return bool(((table == 0) | (table == 1)).all())


_Zeroing = Callable[[GraphState, ClosedForms, fx.Node, fx.Node], fx.Node | None]
_ZEROING: dict[str, _Zeroing] = {
    "aten.mul": _times,
    "aten.masked_fill": _filled,
    "aten.where": _where,
    "aten.tril": _lower,
}
