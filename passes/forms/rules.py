"""Closed-form rules: what each ATen op does to forms. An op without a rule has no closed form."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch

from treespec_compiler.ir.provenance import op_name

from .call import OpCall
from .form import Form, axis, number, rename


def _arange(call: OpCall) -> Form | None:
    start, step = call.size(call.arg("start", 0)), call.size(call.arg("step", 1))
    if start is None or step is None or call.size(call.arg("end")) is None:
        return None
    return call.result(start + step * axis(0))


def _constant(value: Any) -> Callable[[OpCall], Form | None]:
    return lambda call: (
        call.result(sympy.true if value else sympy.false) if call.dtype is torch.bool else call.result(number(value))
    )


def _filled(name: str) -> Callable[[OpCall], Form | None]:
    def rule(call: OpCall) -> Form | None:
        value = call.form(call.arg(name))
        return None if value is None or value.shape != () else call.result(value.expr)

    return rule


def _pointwise(function: Callable[..., Any], *, numeric: bool = True) -> Callable[[OpCall], Form | None]:
    def rule(call: OpCall) -> Form | None:
        if call.arg("alpha", 1) != 1:
            return None
        forms = [call.broadcast(a) for a in call.operands]
        values = [(f.as_number() if numeric else f.as_bool()) for f in forms if f is not None]
        return call.result(function(*values)) if len(values) == len(forms) else None

    return rule


def _compare(relation: Callable[..., Any]) -> Callable[[OpCall], Form | None]:
    """A comparison; branches of a Piecewise are compared one by one, so that the result is plain logic."""

    def decide(a: Any, b: Any) -> Any:
        for left, x in ((True, a), (False, b)):
            folded = sympy.piecewise_fold(x) if x.has(sympy.Piecewise) else x
            if isinstance(folded, sympy.Piecewise):
                result, rest = sympy.false, sympy.true
                for value, condition in folded.args:
                    branch = decide(value, b) if left else decide(a, value)
                    result, rest = (
                        sympy.Or(result, sympy.And(rest, condition, branch)),
                        sympy.And(rest, sympy.Not(condition)),
                    )
                return result
        return relation(a, b)

    return _pointwise(decide)


def _bitwise(logical: Callable[..., Any]) -> Callable[[OpCall], Form | None]:
    def rule(call: OpCall) -> Form | None:
        if call.dtype is not torch.bool:
            return None
        return _pointwise(logical, numeric=False)(call)

    return rule


def _divide(call: OpCall) -> Form | None:
    a, b = call.broadcast(call.node.args[0]), call.broadcast(call.node.args[1])
    if a is None or b is None or b.as_number() == 0:
        return None
    mode = call.arg("rounding_mode")
    quotient = a.as_number() / b.as_number()
    if mode is None:
        return call.result(quotient)
    return call.result(sympy.floor(quotient)) if mode == "floor" else None


def _clamp(call: OpCall) -> Form | None:
    form = call.broadcast(call.node.args[0])
    if form is None:
        return None
    expr = form.as_number()
    for bound, pick in ((call.arg("min"), sympy.Max), (call.arg("max"), sympy.Min)):
        if bound is not None:
            limit = call.broadcast(bound)
            if limit is None:
                return None
            expr = pick(expr, limit.as_number())
    return call.result(expr)


def _log(value: Any) -> Any:
    """The logarithm, and where it is none, what floating point has."""
    if isinstance(value, sympy.Piecewise):
        return sympy.Piecewise(*((_log(v), c) for v, c in value.args))
    if value.is_number and value.is_extended_nonpositive:
        return -sympy.oo if value == 0 else sympy.nan
    return sympy.log(value)


def _where(call: OpCall) -> Form | None:
    if call.arg("self") is None or call.arg("other") is None:
        return None
    return choose(call, *(call.broadcast(a) for a in call.node.args))


def _masked_fill(call: OpCall) -> Form | None:
    kept, mask, value = (call.broadcast(a) for a in call.node.args[:3])
    return choose(call, mask, value, kept)


def choose(call: OpCall, mask: Form | None, yes: Form | None, no: Form | None) -> Form | None:
    if mask is None or yes is None or no is None:
        return None
    condition = mask.as_bool()
    if call.dtype is torch.bool:
        return call.result(sympy.Or(sympy.And(condition, yes.as_bool()), sympy.And(sympy.Not(condition), no.as_bool())))
    return call.result(sympy.Piecewise((yes.as_number(), condition), (no.as_number(), True)))


class trunc(sympy.Function):  # printed in formulas
    """Rounding toward zero."""

    is_integer = True


def _embedding(call: OpCall) -> Form | None:
    table, index = call.form(call.node.args[0]), call.form(call.node.args[1])
    if table is None or index is None or index.is_bool:
        return None
    return call.result(rename(table, {0: index.expr, 1: axis(len(call.shape) - 1)}))


def _identity(call: OpCall) -> Form | None:
    form = call.form(call.node.args[0])
    if form is None:
        return None
    source = call.node.args[0].meta["val"].dtype
    to_integer = not call.dtype.is_floating_point and call.dtype is not torch.bool
    if to_integer and source.is_floating_point and form.expr.is_integer is not True:
        return call.result(trunc(form.expr))
    return call.result(form.expr)


def dimension(call: OpCall, dim: Any, rank: int) -> int:
    return int(dim) % max(rank, 1)


def _unsqueeze(call: OpCall) -> Form | None:
    form = call.form(call.node.args[0])
    if form is None:
        return None
    at = dimension(call, call.node.args[1], len(call.shape))
    return call.result(rename(form, {i: axis(i + (i >= at)) for i in range(len(form.shape))}))


def _reshape(call: OpCall) -> Form | None:
    """Only size-1 dimensions may come or go."""
    form = call.form(call.node.args[0])
    if form is None or call.node.target is torch.ops.aten.view.dtype:  # the same bits are another number there
        return None
    before = [i for i, s in enumerate(form.shape) if s != 1]
    after = [i for i, s in enumerate(call.shape) if s != 1]
    if [form.shape[i] for i in before] != [call.shape[i] for i in after]:
        return None
    return call.result(rename(form, {b: axis(a) for b, a in zip(before, after, strict=True)}))


def _expand(call: OpCall) -> Form | None:
    return call.broadcast(call.node.args[0])


def _repeat(call: OpCall) -> Form | None:
    """Index i of a repeated dimension of size s reads i mod s; size-1 dimensions read 0."""
    form = call.form(call.node.args[0])
    if form is None:
        return None
    shift = len(call.shape) - len(form.shape)
    mapping: dict[int, Any] = {}
    for i, size in enumerate(form.shape):
        here = axis(i + shift)
        mapping[i] = here if call.shape[i + shift] == size else sympy.Integer(0) if size == 1 else sympy.Mod(here, size)
    return call.result(rename(form, mapping))


def _permute(call: OpCall) -> Form | None:
    form = call.form(call.node.args[0])
    if form is None:
        return None
    rank = len(form.shape)
    if op_name(call.node) == "aten.permute":
        order = [dimension(call, d, rank) for d in call.node.args[1]]
    else:
        order = list(range(rank))
        i, j = (
            (dimension(call, d, rank) for d in call.node.args[1:3])
            if op_name(call.node) == "aten.transpose"
            else (0, rank - 1)
        )
        order[i], order[j] = order[j], order[i]
    return call.result(rename(form, {old: axis(new) for new, old in enumerate(order)}))


def _start(call: OpCall, start: Any, size: sympy.Expr) -> sympy.Expr | None:
    value = call.size(0 if start is None else start)
    if value is None:
        return None
    return value + size if value.is_negative else value


def _slice(call: OpCall) -> Form | None:
    form = call.form(call.node.args[0])
    if form is None:
        return None
    at = dimension(call, call.arg("dim"), len(form.shape))
    step = call.size(call.arg("step"))
    start = _start(call, call.arg("start"), form.shape[at])
    return None if start is None or step is None else call.result(rename(form, {at: start + step * axis(at)}))


def _select(call: OpCall) -> Form | None:
    form = call.form(call.node.args[0])
    if form is None:
        return None
    at = dimension(call, call.node.args[1], len(form.shape))
    index = _start(call, call.node.args[2], form.shape[at])
    if index is None:
        return None
    mapping: dict[int, Any] = {i: axis(i - (i > at)) for i in range(len(form.shape))}
    mapping[at] = index
    return call.result(rename(form, mapping))


def _least(expr: Any) -> Any:
    """A number that the expression is never below: of clipped distances, where their bounds are."""
    if expr.is_number:
        return expr
    if isinstance(expr, sympy.Add):
        return sympy.Add(*map(_least, expr.args))
    if isinstance(expr, sympy.Max):
        return max(map(_least, expr.args))
    if isinstance(expr, sympy.Min):
        return min(map(_least, expr.args))
    return sympy.Integer(0) if expr.is_nonnegative else -sympy.oo


def _index(call: OpCall) -> Form | None:
    """Advanced indexing whose index tensors stand side by side."""
    form = call.form(call.node.args[0])
    if form is None:
        return None
    indices = list(call.node.args[1])
    used = [i for i, x in enumerate(indices) if x is not None]
    if not used or used != list(range(used[0], used[-1] + 1)):
        return None
    rank = len(call.shape) - (len(form.shape) - len(used))
    first = used[0]
    mapping: dict[int, Any] = {}
    for i in range(len(form.shape)):
        if i in used:
            index = call.form(indices[i])
            if index is None or index.is_bool or not (index.expr.is_nonnegative or _least(index.expr) >= 0):
                return None  # a negative index counts from the end
            shift = first + rank - len(index.shape)
            mapping[i] = rename(index, {j: axis(j + shift) for j in range(len(index.shape))})
        else:
            mapping[i] = axis(i if i < first else i - len(used) + rank)
    return call.result(rename(form, mapping))


def _index_select(call: OpCall) -> Form | None:
    form, index = call.form(call.node.args[0]), call.form(call.node.args[2])
    if form is None or index is None or len(index.shape) != 1:
        return None
    at = dimension(call, call.node.args[1], len(form.shape))
    return call.result(rename(form, {at: rename(index, {0: axis(at)})}))


RULES: dict[str, Callable[[OpCall], Form | None]] = {
    "aten.arange": _arange,
    "aten.ones": _constant(1),
    "aten.zeros": _constant(0),
    "aten.new_ones": _constant(1),
    "aten.new_zeros": _constant(0),
    "aten.ones_like": _constant(1),
    "aten.zeros_like": _constant(0),
    "aten.full": _filled("fill_value"),
    "aten.full_like": _filled("fill_value"),
    "aten.new_full": _filled("fill_value"),
    "aten.scalar_tensor": _filled("s"),
    "aten.add": _pointwise(operator.add),
    "aten.sub": _pointwise(operator.sub),
    "aten.rsub": _pointwise(lambda a, b: b - a),
    "aten.mul": _pointwise(operator.mul),
    "aten.neg": _pointwise(operator.neg),
    "aten.abs": _pointwise(sympy.Abs),
    "aten.minimum": _pointwise(sympy.Min),
    "aten.maximum": _pointwise(sympy.Max),
    "aten.remainder": _pointwise(sympy.Mod),
    "aten.floor_divide": _pointwise(lambda a, b: sympy.floor(a / b)),
    "aten.div": _divide,
    "aten.clamp": _clamp,
    "aten.clamp_min": _pointwise(sympy.Max),
    "aten.clamp_max": _pointwise(sympy.Min),
    "aten.eq": _compare(sympy.Eq),
    "aten.ne": _compare(sympy.Ne),
    "aten.lt": _compare(sympy.Lt),
    "aten.le": _compare(sympy.Le),
    "aten.gt": _compare(sympy.Gt),
    "aten.ge": _compare(sympy.Ge),
    "aten.__and__": _bitwise(sympy.And),
    "aten.__or__": _bitwise(sympy.Or),
    "aten.bitwise_and": _bitwise(sympy.And),
    "aten.bitwise_or": _bitwise(sympy.Or),
    "aten.bitwise_not": _bitwise(sympy.Not),
    "aten.logical_and": _pointwise(sympy.And, numeric=False),
    "aten.logical_or": _pointwise(sympy.Or, numeric=False),
    "aten.logical_not": _pointwise(sympy.Not, numeric=False),
    "aten.where": _where,
    "aten.masked_fill": _masked_fill,
    "aten._to_copy": _identity,
    "aten.to": _identity,
    "aten.clone": _identity,
    "aten.detach": _identity,
    "aten.alias": _identity,
    "aten.contiguous": _identity,
    "aten.lift_fresh_copy": _identity,
    "aten.unsqueeze": _unsqueeze,
    "aten.squeeze": _reshape,
    "aten.view": _reshape,
    "aten.reshape": _reshape,
    "aten._unsafe_view": _reshape,
    "aten.expand": _expand,
    "aten.repeat": _repeat,
    "aten.pow": _pointwise(operator.pow),
    "aten.exp": _pointwise(sympy.exp),
    "aten.log": _pointwise(_log),
    "aten.sqrt": _pointwise(sympy.sqrt),
    "aten.floor": _pointwise(sympy.floor),
    "aten.reciprocal": _pointwise(lambda a: 1 / a),
    "aten.embedding": _embedding,
    "aten.permute": _permute,
    "aten.transpose": _permute,
    "aten.t": _permute,
    "aten.slice": _slice,
    "aten.select": _select,
    "aten.index": _index,
    "aten.index_select": _index_select,
}
