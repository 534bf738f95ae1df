"""What the specs say, as sympy expressions: which keys are seen, how a score is changed, which position is read.

The symbols are Q and K, the positions of a query and a key on one path; D = Q - K, their distance; H, the query head;
S, the scaled product q.k. Tables are functions: `slopes(H)`, `bias(H, d)`.
"""

from __future__ import annotations

from typing import Any

import sympy

from .predicates import CAUSAL as CAUSAL
from .predicates import K as K
from .predicates import Q as Q
from .specs import MaskSpec, PositionSpec

D, H = sympy.symbols("d h", integer=True, nonnegative=True)
S = sympy.Symbol("s", real=True)
DISTANCES = sympy.Symbol("distances", integer=True, positive=True)
"""How many distances a bias table has; farther keys get the bias of the last one."""
slopes, bias = sympy.Function("slopes", real=True), sympy.Function("bias", real=True)


def number(value: float) -> Any:
    """Exactly this number."""
    return sympy.Integer(int(value)) if value == int(value) else sympy.Rational(*float(value).as_integer_ratio())


def predicate(mask: MaskSpec) -> Any:
    """Which keys K a query Q sees."""
    return sympy.And(*mask.terms)


def without_causal(formula: Any) -> Any:
    """The rest of a conjunction where K <= Q is known, as for the keys of one path."""
    return sympy.And(*(term for term in sympy.And.make_args(formula) if term != CAUSAL))


def by_distance(formula: Any) -> Any:
    """The same with D for Q - K, where the distance is known already."""
    return formula.xreplace({Q - K: D})


def score(softcap: float = 0.0, has_slopes: bool = False, has_bias: bool = False) -> Any:
    """A score after softcap, ALiBi and relative bias, in S, H and D (see `ir.scores`)."""
    result: Any = S
    if softcap:
        cap = number(softcap)
        result = cap * sympy.tanh(S / cap)
    if has_slopes:
        result -= slopes(H) * D
    if has_bias:
        result += bias(H, sympy.Min(D, DISTANCES - 1))
    return result


def position(spec: PositionSpec, i: Any = Q) -> Any:
    """What a reader of positions gets for token i."""
    return i + spec.offset
