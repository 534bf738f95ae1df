"""Where a relation changes that is linear in one symbol."""

from __future__ import annotations

from typing import Any

import sympy


def turning_point(condition: Any, symbol: sympy.Symbol) -> sympy.Expr | None:
    """The value of `symbol` at which both sides are equal; None for any condition that is not linear in it."""
    if not isinstance(condition, sympy.core.relational.Relational):
        return None
    gap = sympy.expand(condition.lhs - condition.rhs)
    if not gap.is_polynomial(symbol) or sympy.degree(gap, symbol) != 1:
        return None
    return root(gap, symbol)


def root(gap: Any, symbol: sympy.Symbol) -> sympy.Expr:
    """The zero of a polynomial of degree one."""
    return -gap.coeff(symbol, 0) / gap.coeff(symbol, 1)
