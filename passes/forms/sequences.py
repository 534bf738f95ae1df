"""Closed-form rules for ops along a dimension: running sums, differences, triangles, the largest element."""

from __future__ import annotations

from collections.abc import Callable

import sympy

from .call import OpCall
from .form import Form, axis, rename
from .rules import choose, dimension


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


def _over_pairs(call: OpCall) -> bool:
    """Whether this is a table over pairs of tokens. NOTE one over tokens (angles side by side) is best left alone: its
    parts are positions, and their closed forms say so."""
    return sum(bool(size.free_symbols) for size in call.shape) > 1


def _pad(call: OpCall) -> Form | None:
    """Constants around the last dimensions."""
    if not _over_pairs(call):
        return None
    form, widths, mode = call.form(call.node.args[0]), call.arg("pad"), call.arg("mode", "constant")
    if form is None or mode != "constant":
        return None
    value = call.arg("value")
    filled = call.form(0 if value is None else value)
    expr, kept = form.expr, sympy.true
    for i in range(len(widths) // 2):
        at = len(call.shape) - 1 - i
        before, after = call.size(widths[2 * i]), call.size(widths[2 * i + 1])
        if before is None or after is None:
            return None
        expr = expr.xreplace({axis(at): axis(at) - before})
        low = sympy.true if before == 0 else sympy.Ge(axis(at), before)
        high = sympy.true if after == 0 else sympy.Lt(axis(at), form.shape[at] + before)
        kept = sympy.And(kept, low, high)
    if filled is None:
        return None
    return choose(call, Form(kept, call.shape), Form(expr, call.shape), filled)


def _cat(call: OpCall) -> Form | None:
    """Tensors one after the other."""
    if not _over_pairs(call):
        return None
    at = dimension(call, call.arg("dim"), len(call.shape))
    result: Form | None = None
    end = call.shape[at]
    for part in reversed(call.node.args[0]):
        form = call.form(part)
        if form is None or len(form.shape) != len(call.shape):
            return None
        end = end - form.shape[at]
        if form.shape[at] == 0:
            continue
        here = Form(form.expr.xreplace({axis(at): axis(at) - end}), call.shape)
        if result is None:
            result = here
            continue
        result = choose(call, Form(sympy.Lt(axis(at), end + form.shape[at]), call.shape), here, result)
        if result is None:
            return None
    return None if result is None else call.result(result.expr)


def _fill(call: OpCall) -> Form | None:
    value = call.form(call.node.args[1])
    return None if value is None or value.expr.free_symbols else call.result(value.as_number())


def _written(call: OpCall) -> Form | None:
    """A tensor of which some rows or columns were written anew: `m[:, :4] = 1`."""
    base, new = call.form(call.node.args[0]), call.form(call.node.args[1])
    at = dimension(call, call.arg("dim"), len(call.shape))
    if base is None or new is None:
        return None
    symbol = axis(at)
    if call.arg("index") is not None:
        place = call.size(call.arg("index"))
        if place is None:
            return None
        place = place + call.shape[at] if place.is_negative else place
        later = {axis(i): axis(i + 1) for i in range(at, len(call.shape) - 1)}
        part = Form(sympy.sympify(new.expr).xreplace(later), call.shape)
        return choose(call, Form(sympy.Eq(symbol, place), call.shape), part, base)
    start, stop = (call.size(0 if value is None else value) for value in (call.arg("start"), call.arg("end")))
    if start is None or stop is None or call.arg("step") != 1 or not (start.is_Integer and start >= 0):
        return None
    stop = call.shape[at] if call.arg("end") is None or (stop.is_Integer and stop >= _END) else stop
    if not (stop == call.shape[at] or (stop.is_Integer and stop >= 0)):
        return None
    inside = sympy.And(symbol >= start, sympy.true if stop == call.shape[at] else symbol < stop)
    part = Form(sympy.sympify(new.expr).xreplace({symbol: symbol - start}), call.shape)
    return choose(call, Form(inside, call.shape), part, base)


# Slices to the end are written with the largest int64.
_END = 2**62


def _flip(call: OpCall) -> Form | None:
    form = call.form(call.node.args[0])
    if form is None:
        return None
    dims = [dimension(call, d, len(form.shape)) for d in call.node.args[1]]
    return call.result(rename(form, {d: form.shape[d] - 1 - axis(d) for d in dims}))


SEQUENCE_RULES: dict[str, Callable[[OpCall], Form | None]] = {
    "aten.cumsum": _cumsum,
    "aten.diff": _diff,
    "aten.pad": _pad,
    "aten.constant_pad_nd": _pad,
    "aten.cat": _cat,
    "aten.fill": _fill,
    "aten.flip": _flip,
    "aten.slice_scatter": _written,
    "aten.select_scatter": _written,
    "aten.tril": _triangle(lower=True),
    "aten.triu": _triangle(lower=False),
    "aten.max": _extreme(largest=True),
    "aten.amax": _extreme(largest=True),
    "aten.min": _extreme(largest=False),
    "aten.amin": _extreme(largest=False),
}
