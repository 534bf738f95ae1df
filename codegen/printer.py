"""Prints sympy expressions as Triton or torch code.

Both dialects are the same printer with other words, so what a kernel computes can be run as a torch function
(`tests/printed.py`). Integer symbols stand for integer tensors: floor and Mod are exact and round down, also for
negative numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter


class Unprintable(Exception):
    """An expression that the printer has no words for."""


@dataclass(frozen=True)
class Dialect:
    """How a language spells functions of floats, and what its integer division does."""

    prefix: str
    functions: Mapping[str, str]
    rounds_down: bool
    """Whether // and % round down; those of a GPU round towards zero."""


_FUNCTIONS = {name: name for name in ("exp", "exp2", "log", "sqrt", "abs", "floor", "where", "minimum", "maximum")}
TRITON = Dialect("tl.", _FUNCTIONS, rounds_down=False)
TORCH = Dialect("", _FUNCTIONS, rounds_down=True)

# Numerators and denominators above this are bits of a float, which is printed as one.
_LARGE = 1 << 31

# Triton has no tanh of its own that every backend and the interpreter know.
TANH = '''@triton.jit
def tanh(x):
    """Of floats. The exponential underflows to 0 for large |x|, which gives 1; it never overflows."""
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, e - 1.0, 1.0 - e) / (1.0 + e)
'''
HELPERS = {"tanh": TANH}
"""Functions that printed Triton code may call, with their source."""


class Printer(StrPrinter):
    """`names`: what a symbol is called. `tables`: the code that reads a table, from the code of its indices."""

    def __init__(
        self,
        dialect: Dialect,
        names: Mapping[str, str] | None = None,
        tables: Mapping[str, Callable[..., str]] | None = None,
    ) -> None:
        super().__init__()
        self.dialect, self.names, self.tables = dialect, names or {}, tables or {}
        self.helpers: set[str] = set()
        """Of HELPERS, those that the printed code calls."""

    def _print(self, expr: Any, **kwargs: Any) -> str:
        if getattr(expr, "is_number", False) and expr.is_finite and not expr.is_Rational:
            return self._print_Float(expr)  # functions of tensors do not take numbers
        return super()._print(expr, **kwargs)

    def _call(self, function: str, *args: str) -> str:
        return f"{self.dialect.prefix}{self.dialect.functions[function]}({', '.join(args)})"

    def _float(self, expr: Any) -> str:
        """An argument of a function of floats."""
        return f"1.0 * {self.parenthesize(expr, PRECEDENCE['Mul'])}" if expr.is_integer else self._print(expr)

    def emptyPrinter(self, expr: Any) -> str:
        raise Unprintable(f"no code for {type(expr).__name__}: {expr}")

    def _print_Symbol(self, expr: Any) -> str:
        return self.names.get(expr.name, expr.name)

    def _print_Rational(self, expr: Any) -> str:
        return repr(float(expr))

    _print_Float = _print_Rational

    def _print_BooleanTrue(self, expr: Any) -> str:
        return "True"

    def _print_BooleanFalse(self, expr: Any) -> str:
        return "False"

    def _print_Infinity(self, expr: Any) -> str:
        return 'float("inf")'

    def _print_NegativeInfinity(self, expr: Any) -> str:
        return '-float("inf")'

    def _print_Add(self, expr: Any, order: Any = None) -> str:
        """What is added before what is subtracted."""
        terms = sorted(expr.as_ordered_terms(), key=lambda term: term.could_extract_minus_sign())
        text = self.parenthesize(terms[0], PRECEDENCE["Add"], strict=True)
        for term in terms[1:]:
            minus = term.could_extract_minus_sign()
            text += f" {'-' if minus else '+'} {self._term(-term if minus else term)}"
        return text

    def _term(self, expr: Any) -> str:
        return self.parenthesize(expr, PRECEDENCE["Mul"], strict=True)

    def _print_Mul(self, expr: Any) -> str:
        """Products first, then one division, as a person would write them."""
        sign, over, under = "", [], []
        for factor in expr.as_ordered_factors():
            base, exponent = factor.as_base_exp()
            if factor.is_Rational:
                if factor < 0:
                    sign, factor = ("-" if not sign else ""), -factor
                if max(factor.p, factor.q) > _LARGE:
                    over.append(sympy.Float(factor))
                    continue
                over += [sympy.Integer(factor.p)] if factor.p != 1 else []
                under += [sympy.Integer(factor.q)] if factor.q != 1 else []
            elif exponent.is_Integer and exponent < 0:
                under.append(base**-exponent)
            else:
                over.append(factor)
        text = " * ".join(self.parenthesize(f, PRECEDENCE["Mul"]) for f in over) or "1"
        for factor in under:
            text += f" / {self.parenthesize(factor, PRECEDENCE['Pow'])}"
        return sign + text

    def _print_Pow(self, expr: Any, rational: bool = False) -> str:
        base, exponent = expr.base, expr.exp
        if exponent == sympy.Rational(1, 2):
            return self._call("sqrt", self._float(base))
        if exponent.is_Integer and 1 < exponent <= 4:
            return "(" + " * ".join([self.parenthesize(base, PRECEDENCE["Mul"])] * int(exponent)) + ")"
        if exponent.is_Integer and -4 <= exponent < 0:
            return f"(1.0 / {self.parenthesize(base**-exponent, PRECEDENCE['Pow'])})"
        if base == 2:
            return self._call("exp2", self._float(exponent))
        if base == sympy.E:
            return self._print_exp(sympy.exp(exponent, evaluate=False))
        if base.is_positive:
            return self._print(sympy.exp(exponent * sympy.log(base), evaluate=False))
        raise Unprintable(f"no code for a power of what may be negative: {expr}")

    def _print_Relational(self, expr: Any) -> str:
        operator = {"Eq": "==", "Ne": "!="}.get(type(expr).__name__, expr.rel_op)
        left, right = (self.parenthesize(side, PRECEDENCE["Add"], strict=True) for side in (expr.lhs, expr.rhs))
        return f"{left} {operator} {right}"

    def _print_And(self, expr: Any) -> str:
        return " & ".join(f"({self._print(term)})" for term in sorted(expr.args, key=sympy.default_sort_key))

    def _print_Or(self, expr: Any) -> str:
        return " | ".join(f"({self._print(term)})" for term in sorted(expr.args, key=sympy.default_sort_key))

    def _print_Not(self, expr: Any) -> str:
        return f"~({self._print(expr.args[0])})"

    def _print_floor(self, expr: Any) -> str:
        numerator, divisor = sympy.fraction(sympy.together(expr.args[0]))
        if not (numerator.is_integer and divisor.is_Integer and divisor > 0):
            return self._call("floor", self._float(expr.args[0]))
        text = self.parenthesize(numerator, PRECEDENCE["Mul"])
        if not self.dialect.rounds_down and not numerator.is_nonnegative:
            text = f"({self._print(numerator)} - {self._modulo(numerator, divisor)})"
        return f"({text} // {divisor})"

    def _print_Mod(self, expr: Any) -> str:
        number, divisor = expr.args
        if not (number.is_integer and divisor.is_Integer and divisor > 0):
            raise Unprintable(f"no code for a remainder other than of integers by a positive number: {expr}")
        return self._modulo(number, divisor)

    def _modulo(self, number: Any, divisor: Any) -> str:
        text = f"({self.parenthesize(number, PRECEDENCE['Mul'])} % {divisor})"
        # (x % n + n) % n is right however % rounds.
        return text if self.dialect.rounds_down or number.is_nonnegative else f"(({text} + {divisor}) % {divisor})"

    def _print_Abs(self, expr: Any) -> str:
        return self._call("abs", self._print(expr.args[0]))

    def _print_Min(self, expr: Any) -> str:
        return self._nested("minimum", expr)

    def _print_Max(self, expr: Any) -> str:
        return self._nested("maximum", expr)

    def _nested(self, function: str, expr: Any) -> str:
        first, *rest = sorted(expr.args, key=lambda a: (a.is_number, sympy.default_sort_key(a)))
        text = self._print(first)
        for other in rest:
            text = self._call(function, text, self._print(other))
        return text

    def _print_exp(self, expr: Any) -> str:
        return self._call("exp", self._float(expr.args[0]))

    def _print_log(self, expr: Any) -> str:
        return self._call("log", self._float(expr.args[0]))

    def _print_tanh(self, expr: Any) -> str:
        self.helpers.add("tanh")
        return f"tanh({self._float(expr.args[0])})"

    def _print_Piecewise(self, expr: Any) -> str:
        *cases, (default, condition) = expr.args
        if condition != sympy.true:
            raise Unprintable(f"no code for a case distinction without a last case: {expr}")
        text = self._print(default)
        for value, condition in reversed(cases):
            text = self._call("where", self._print(condition), self._print(value), text)
        return text

    def _print_Function(self, expr: Any) -> str:
        reader = self.tables.get(expr.func.__name__)
        if reader is None:
            raise Unprintable(f"no code for {expr.func.__name__}: {expr}")
        return reader(*(self._print(a) for a in expr.args))
