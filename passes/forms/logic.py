"""Closed-form rules for logic that is spelled as arithmetic: products of masks, exclusive or, shifts, signs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch

from .call import OpCall
from .form import Form
from .rules import RULES

Rule = Callable[[OpCall], Form | None]


def _condition(form: Form) -> Any:
    """c of a form that is 1 where c holds and 0 elsewhere."""
    if form.is_bool:
        return form.expr
    if isinstance(form.expr, sympy.Piecewise) and [v for v, _ in form.expr.args] == [1, 0]:
        return form.expr.args[0][1]
    return None


def _product(call: OpCall) -> Form | None:
    """A product of zeros and ones is a conjunction."""
    pair = [call.broadcast(a) for a in call.operands]
    conditions = [None if form is None else _condition(form) for form in pair]
    if len(conditions) != 2 or None in conditions:
        return RULES["aten.mul"](call)
    both = Form(sympy.And(*conditions), call.shape)
    return call.result(both.expr if call.dtype is torch.bool else both.as_number())


def _exclusive(call: OpCall) -> Form | None:
    pair = [call.broadcast(a) for a in call.operands]
    if call.dtype is not torch.bool or len(pair) != 2 or None in pair:
        return None
    a, b = (form.as_bool() for form in pair if form is not None)
    return call.result(sympy.Or(sympy.And(a, sympy.Not(b)), sympy.And(sympy.Not(a), b)))


def _shift(right: bool) -> Rule:
    """By a number of bits that is known: a division or a product by a power of two."""

    def rule(call: OpCall) -> Form | None:
        form, bits = call.broadcast(call.node.args[0]), call.form(call.node.args[1])
        if form is None or bits is None or not bits.expr.is_Integer or not 0 <= bits.expr < 31:
            return None
        value, by = form.as_number(), sympy.Integer(2) ** bits.expr
        return call.result(sympy.floor(value / by) if right else value * by)

    return rule


def _sign(call: OpCall) -> Form | None:
    form = call.broadcast(call.node.args[0])
    if form is None:
        return None
    value = form.as_number()
    return call.result(sympy.Piecewise((1, value > 0), (-1, value < 0), (0, True)))


def _quotient(call: OpCall) -> Form | None:
    """Rounding toward zero is rounding down where nothing is negative."""
    if call.arg("rounding_mode") != "trunc":
        return RULES["aten.div"](call)
    a, b = call.broadcast(call.node.args[0]), call.broadcast(call.node.args[1])
    if a is None or b is None or b.as_number() == 0:
        return None
    quotient = a.as_number() / b.as_number()
    return call.result(sympy.floor(quotient)) if quotient.is_nonnegative else None


def _exp2(call: OpCall) -> Form | None:
    form = call.broadcast(call.node.args[0])
    return None if form is None else call.result(sympy.Integer(2) ** form.as_number())


LOGIC_RULES: dict[str, Rule] = {
    "aten.mul": _product,
    "aten.div": _quotient,
    "aten.bitwise_xor": _exclusive,
    "aten.__xor__": _exclusive,
    "aten.logical_xor": _exclusive,
    "aten.__rshift__": _shift(right=True),
    "aten.bitwise_right_shift": _shift(right=True),
    "aten.__lshift__": _shift(right=False),
    "aten.bitwise_left_shift": _shift(right=False),
    "aten.sign": _sign,
    "aten.sgn": _sign,
    "aten.exp2": _exp2,
}
