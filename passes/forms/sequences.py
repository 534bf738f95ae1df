"""Closed-form rules for ops along a dimension: running sums, differences, triangles, the largest element."""

from __future__ import annotations

from collections.abc import Callable

import sympy

from .form import Form, axis
from .rules import OpCall, choose, dimension


def _cumsum(call: OpCall) -> Form | None:
    form = call.form(call.node.args[0])
    if form is None or not form.shape:
        return None
    at = dimension(call, call.node.args[1], len(form.shape))
    expr = form.as_number()
    return None if axis(at) in expr.free_symbols else call.result(sympy.expand(expr * (axis(at) + 1)))


def _diff(call: OpCall) -> Form | None:
    form, before = call.form(call.node.args[0]), call.form(call.arg("prepend"))
    at = dimension(call, call.arg("dim"), len(call.shape))
    if form is None or before is None or call.arg("n") != 1 or before.shape[at] != 1 or call.arg("append") is not None:
        return None
    expr = form.as_number()
    later = sympy.expand(expr - expr.xreplace({axis(at): axis(at) - 1}))
    first = sympy.expand(expr.xreplace({axis(at): sympy.Integer(0)}) - before.as_number())
    return call.result(later if later == first else sympy.Piecewise((first, sympy.Eq(axis(at), 0)), (later, True)))


def _triangle(lower: bool) -> Callable[[OpCall], Form | None]:
    def rule(call: OpCall) -> Form | None:
        form = call.form(call.node.args[0])
        if form is None:
            return None
        row, column = axis(len(call.shape) - 2), axis(len(call.shape) - 1)
        diagonal = call.size(call.arg("diagonal"))
        if diagonal is None:
            return None
        kept = sympy.Le(column - row, diagonal) if lower else sympy.Ge(column - row, diagonal)
        return choose(call, Form(kept, call.shape), form, Form(sympy.Integer(0), call.shape))

    return rule


def _extreme(largest: bool) -> Callable[[OpCall], Form | None]:
    """max() or min() over all elements of a form that is linear in every index."""

    def rule(call: OpCall) -> Form | None:
        form = call.form(call.node.args[0])
        if form is None or form.is_bool or call.arg("dim") or call.arg("other") is not None:
            return None
        expr = sympy.expand(form.expr)
        for i, size in enumerate(form.shape):
            slope = expr.coeff(axis(i), 1)
            if not slope.is_number or axis(i) in (expr - slope * axis(i)).free_symbols:
                return None
            expr = expr.xreplace({axis(i): size - 1 if (slope > 0) == largest else sympy.Integer(0)})
        return call.result(expr)

    return rule


SEQUENCE_RULES: dict[str, Callable[[OpCall], Form | None]] = {
    "aten.cumsum": _cumsum,
    "aten.diff": _diff,
    "aten.tril": _triangle(lower=True),
    "aten.triu": _triangle(lower=False),
    "aten.max": _extreme(largest=True),
    "aten.amax": _extreme(largest=True),
    "aten.min": _extreme(largest=False),
    "aten.amin": _extreme(largest=False),
}
