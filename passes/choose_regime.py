"""choose regime: where(number of tokens > n, a, b) becomes b, for contexts of up to n tokens.

A model may take one set of frequencies for short prompts and another for long ones (longrope), which in a tree program
would depend on the longest path of the batch. Up to the first length at which the condition changes it is a constant;
the context ends there, since K made under one regime is not K under the other. Buffers that forward overwrites as a
whole before it reads them carry nothing from call to call, and stop being state.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from treespec_compiler.ir.provenance import op_name, source_line
from treespec_compiler.ir.specs import Limit

from .forms.closed_form import shape_of
from .forms.turning_point import turning_point
from .framework.manager import Pass
from .framework.state import GraphState

aten = torch.ops.aten


def choose_regime(state: GraphState) -> int:
    """Replace choices by the number of tokens, and buffers that are overwritten; returns how many."""
    return _choices(state) + _overwritten(state)


def _choices(state: GraphState) -> int:
    found = [n for n in state.graph.nodes if _chooses(n) and _is_scalar(n.args[0])]
    forms = state.closed_forms() if found else None
    matches = 0
    for node in found:
        assert forms is not None
        form = forms.of(node.args[0])
        decided = _regime(form.as_bool(), state.length) if form is not None else None
        if decided is None:
            continue
        holds, last = decided
        chosen: Any = node.args[1] if holds else node.args[2]
        if not isinstance(chosen, fx.Node) or chosen.meta["val"].dtype != node.meta["val"].dtype:
            continue
        if shape_of(chosen) != shape_of(node):
            continue
        state.proved_by(node.args[0])
        if last is not None:
            where = source_line(node) or node.name
            state.limits.append(Limit(last, f"above {last} tokens the model takes other values at {where}"))
        node.replace_all_uses_with(chosen)
        state.graph.erase_node(node)
        matches += 1
    return matches


def _chooses(node: fx.Node) -> bool:
    return op_name(node) == "aten.where" and node.target is not aten.where.default


def _is_scalar(node: Any) -> bool:
    return isinstance(node, fx.Node) and shape_of(node) == ()


def _regime(condition: Any, length: sympy.Symbol) -> tuple[bool, int | None] | None:
    """(what the condition is from one token on, the last number of tokens it is so for; None: any number)."""
    if condition in (sympy.true, sympy.false):
        return bool(condition), None
    if not isinstance(condition, sympy.core.relational.Relational) or condition.free_symbols != {length}:
        return None
    if isinstance(condition, (sympy.Eq, sympy.Ne)):
        return None
    at = turning_point(condition, length)
    if at is None or not at.is_Rational:
        return None

    def holds(n: Any) -> bool:
        return bool(condition.xreplace({length: sympy.Integer(n)}))

    first = holds(1)
    # A linear inequality changes once: between floor(at) - 1 and floor(at) + 1.
    last = next(
        (n for n in range(max(1, int(sympy.floor(at)) - 1), int(sympy.floor(at)) + 3) if holds(n) != first), None
    )
    return first, None if last is None else last - 1


def _overwritten(state: GraphState) -> int:
    """Drop buffers that are written as a whole before anything reads them: nothing reads their old contents."""
    outputs: Any = state.output.args[0]
    kept = [(name, new) for name, new in zip(state.written, outputs[1:], strict=True) if state.node(name).users]
    gone = [name for name in state.written if not state.node(name).users]
    state.written = [name for name, _ in kept]
    state.output.args = ((outputs[0], *(new for _, new in kept)),)
    for name in gone:
        state.forget(name)
    return len(gone)


PASS = Pass(
    "choose regime",
    choose_regime,
    before="normalized graph",
    after="no value is chosen by the number of tokens; a buffer that is overwritten whole is no state",
    needs=("normalize",),
)
