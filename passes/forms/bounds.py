"""Conditions that hold for every element of a tensor, or for none: an index is below the size of its dimension."""

from __future__ import annotations

from typing import Any

import sympy
from sympy.core.function import Application
from sympy.core.relational import Relational

from .form import Form, axis

# The number of tokens is at least 2 in every trace; what depends on one token alone is checked by value.
_LEAST = 2


def decided(form: Form) -> Form:
    """The form with every condition on sizes decided that is the same for all of its indices."""
    telling = {s for size in form.shape for s in size.free_symbols}
    telling |= {axis(i) for i, size in enumerate(form.shape) if size.is_Integer and size > 1}
    if not form.expr.free_symbols & telling:
        return form
    known: dict[Any, Any] = {}
    for extreme in form.expr.atoms(Application):
        if extreme.func.__name__ in ("Min", "Max") and extreme.free_symbols & telling:
            found = _least_or_most(extreme, form)
            if found != extreme:
                known[extreme] = found
    if known:
        return decided(Form(form.expr.xreplace(known), form.shape))
    for atom in form.expr.atoms(Relational):
        if atom.free_symbols & telling:
            found = _settled(atom, form)
            if found != atom:
                known[atom] = found
    return Form(form.expr.xreplace(known), form.shape) if known else form


def _least_or_most(extreme: Any, form: Form) -> Any:
    """A `Min` or `Max` without the numbers that it never is, such as T - 1 as the least of it and an index below T."""
    kept = list(extreme.args)
    for number in extreme.args:
        for other in kept:
            gap = other - number if extreme.func.__name__ == "Min" else number - other
            if other is not number and _always(sympy.LessThan(gap, 0, evaluate=False), form):
                kept.remove(number)
                break
    return kept[0] if len(kept) == 1 else extreme.func(*kept)


def _settled(atom: Any, form: Form) -> Any:
    """A condition, decided where it is the same at every index; one on the least of several numbers, such as
    `q - k < min(w, T)`, is one on each of them."""
    parts = _each(atom)
    if parts is not None:
        joined, conditions = parts
        return joined(*(_settled(condition, form) for condition in conditions))
    found = None if atom in (sympy.true, sympy.false) else _always(atom, form)
    return atom if found is None else sympy.true if found else sympy.false


def _each(atom: Any) -> tuple[Any, list[Any]] | None:
    """`And` or `Or`, and the conditions that an inequality with one Min or Max in it says in other words."""
    if not isinstance(atom, _INEQUALITIES):
        return None
    gap = sympy.expand(atom.lhs - atom.rhs)
    for extreme in gap.atoms(Application):
        name = extreme.func.__name__  # torch has classes of its own for sizes
        if name not in ("Min", "Max"):
            continue
        factor = gap.coeff(extreme)
        rest = sympy.expand(gap - factor * extreme)
        if factor.is_number and factor.is_real and factor != 0 and not rest.has(extreme):
            least = (name == "Min") == bool(factor > 0)  # of the whole difference
            some = least == isinstance(atom, (sympy.StrictLessThan, sympy.LessThan))
            conditions = [atom.func(rest + factor * number, 0) for number in extreme.args]
            return (sympy.Or if some else sympy.And), conditions
    return None


_INEQUALITIES = (sympy.StrictLessThan, sympy.LessThan, sympy.StrictGreaterThan, sympy.GreaterThan)


def _always(atom: Any, form: Form) -> bool | None:
    """Whether a condition holds at every index (True), at none (False), or at some."""
    ends = _range(atom.lhs - atom.rhs, form)
    if ends is None:
        return None
    low, high = ends
    if isinstance(atom, sympy.StrictLessThan):
        return _decide(_negative(high), _nonnegative(low))
    if isinstance(atom, sympy.LessThan):
        return _decide(_nonnegative(-high), _negative(-low))
    if isinstance(atom, sympy.StrictGreaterThan):
        return _decide(_negative(-low), _nonnegative(-high))
    if isinstance(atom, sympy.GreaterThan):
        return _decide(_nonnegative(low), _negative(high))
    apart = _negative(high) or _negative(-low)
    if isinstance(atom, sympy.Equality):
        return False if apart else None
    return True if isinstance(atom, sympy.Unequality) and apart else None


def _decide(yes: bool, no: bool) -> bool | None:
    return True if yes else False if no else None


def _range(gap: Any, form: Form) -> tuple[Any, Any] | None:
    """The smallest and the largest value of a difference that is linear in every index, in terms of sizes."""
    gap = sympy.expand(gap)
    low = high = gap
    for i, size in enumerate(form.shape):
        symbol = axis(i)
        if symbol not in gap.free_symbols:
            continue
        if not gap.is_polynomial(symbol) or sympy.degree(gap, symbol) != 1:
            return None
        slope = gap.coeff(symbol, 1)
        if not slope.is_number:
            return None
        first, last = (sympy.Integer(0), size - 1) if slope > 0 else (size - 1, sympy.Integer(0))
        low, high = low.xreplace({symbol: first}), high.xreplace({symbol: last})
    return sympy.expand(low), sympy.expand(high)


def _nonnegative(value: Any) -> bool:
    """Whether an expression in sizes is 0 or more whatever they are."""
    more = {s: sympy.Dummy(integer=True, nonnegative=True) + _LEAST for s in value.free_symbols}
    return bool(sympy.expand(value.xreplace(more)).is_nonnegative)


def _negative(value: Any) -> bool:
    more = {s: sympy.Dummy(integer=True, nonnegative=True) + _LEAST for s in value.free_symbols}
    return bool(sympy.expand(value.xreplace(more)).is_negative)
