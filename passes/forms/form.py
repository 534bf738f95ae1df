"""Forms: sympy expressions over the axes of a tensor, and the symbolic sizes they come with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean
from torch import Tensor, fx

from treespec_compiler.ir.provenance import op_name

Shape = tuple[sympy.Expr, ...]

BY_PLACE = "by place"
"""In a node's `meta`: it is taken for a table whose entries do not depend on how many there are. Whoever says so
compares what is made of it with the values."""


def axis(i: int) -> sympy.Symbol:
    """The index symbol of dimension i."""
    return sympy.Symbol(f"a{i}", integer=True, nonnegative=True)


@dataclass(frozen=True)
class Form:
    """`expr` over axis symbols, for a tensor of this shape."""

    expr: Any  # sympy.Expr or Boolean
    shape: Shape

    @property
    def is_bool(self) -> bool:
        # NOTE sympy counts a plain Symbol as Boolean too.
        return isinstance(self.expr, Boolean) and not isinstance(self.expr, sympy.Symbol)

    @property
    def tables(self) -> set[Any]:
        return self.expr.atoms(sympy.core.function.AppliedUndef)

    def as_number(self) -> sympy.Expr:
        return sympy.Piecewise((1, self.expr), (0, True)) if self.is_bool else self.expr

    def as_bool(self) -> Any:
        if self.is_bool:
            return self.expr
        if isinstance(self.expr, sympy.Piecewise) and [v for v, _ in self.expr.args] == [1, 0]:
            return self.expr.args[0][1]
        return sympy.Ne(self.expr, 0)


def packet(node: fx.Node) -> str:
    """A call's name without `aten.`; empty for anything else."""
    return op_name(node).removeprefix("aten.") if node.op == "call_function" else ""


def number(value: Any) -> sympy.Expr:
    """An exact sympy number: integers stay integers, floats keep every bit."""
    if isinstance(value, bool):
        return sympy.Integer(int(value))
    if isinstance(value, int):
        return sympy.Integer(value)
    if value != value:
        return sympy.nan
    if value in (float("inf"), float("-inf")):
        return sympy.oo if value > 0 else -sympy.oo
    return sympy.Integer(int(value)) if value == int(value) else sympy.Rational(*float(value).as_integer_ratio())


def size_of(value: Any) -> sympy.Expr:
    return value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(int(value))


def shape_of_tensor(tensor: Tensor) -> Shape:
    return tuple(size_of(s) for s in tensor.shape)


def shape_of(node: fx.Node) -> Shape:
    """Symbolic shape of a tensor node; a number has no dimensions."""
    value = node.meta["val"]
    return shape_of_tensor(value) if isinstance(value, Tensor) else ()


def rename(form: Form, mapping: dict[int, Any]) -> Any:
    """The expression with axis i replaced by mapping[i] (all at once)."""
    replacements = {axis(i): sympy.sympify(v) for i, v in mapping.items()}
    return sympy.sympify(form.expr).xreplace(replacements) if replacements else form.expr


def broadcast(form: Form, shape: Shape) -> Form:
    shift = len(shape) - len(form.shape)
    return Form(rename(form, {i: axis(i + shift) for i in range(len(form.shape))}), shape)


def varies(expr: Any) -> bool:
    """Whether the value itself, not only a condition in it, depends on an index or a table."""
    conditions = {c: sympy.Dummy() for c in expr.atoms(Relational)}
    plain = expr.xreplace(conditions)
    return bool(plain.free_symbols - set(conditions.values())) or bool(plain.atoms(AppliedUndef))
