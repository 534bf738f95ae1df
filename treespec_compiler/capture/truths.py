"""`is_causal=x.shape[1] > 1`: a comparison of sizes where an op takes a truth value.

A trace keeps the comparison as it is, which the op does not take. Asked for its truth it becomes a condition on the
number of tokens, whose other side is compared as any other is (`discharge_guards`).
"""

from __future__ import annotations

import ast

_OP, _PLACE = "scaled_dot_product_attention", 5


def causal_as_truth(body: ast.FunctionDef, line: int) -> dict[int, ast.expr] | None:
    """What stands in for `is_causal` of the attention at the line, by its id; None: there is no such thing."""
    found: dict[int, ast.expr] = {}
    for call in ast.walk(body):
        if not isinstance(call, ast.Call) or not call.lineno <= line <= (call.end_lineno or call.lineno):
            continue
        if getattr(call.func, "attr", getattr(call.func, "id", "")) != _OP:
            continue
        given = [k.value for k in call.keywords if k.arg == "is_causal"] + call.args[_PLACE : _PLACE + 1]
        for value in given:
            if not isinstance(value, (ast.Constant, ast.IfExp)):
                told = ast.IfExp(value, ast.Constant(True), ast.Constant(False))
                found[id(value)] = ast.fix_missing_locations(ast.copy_location(told, value))
    return found or None
