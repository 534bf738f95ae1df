"""Random sympy expressions over small integer and real grids, and their values by sympy itself."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from hypothesis import strategies as st

Q, K = sympy.symbols("q k", integer=True, nonnegative=True)
X = sympy.Symbol("x", integer=True)
S = sympy.Symbol("s", real=True)

# One dimension each, so that everything broadcasts.
GRID = {
    Q: torch.arange(4).view(4, 1, 1, 1),
    K: torch.arange(0, 9, 4).view(1, 3, 1, 1),
    X: torch.tensor([-7, -2, 0, 3]).view(1, 1, 4, 1),
    S: torch.tensor([-2.5, 0.0, 0.75], dtype=torch.float32).view(1, 1, 1, 3),
}
_SHAPE = torch.broadcast_shapes(*(t.shape for t in GRID.values()))


def values(expr: Any) -> torch.Tensor:
    """float64, of the grid's full shape."""
    function = sympy.lambdify(list(GRID), expr, modules="sympy")
    points = torch.stack([t.double().expand(_SHAPE).flatten() for t in GRID.values()], 1).tolist()
    exact = [
        [int(v) if s.is_integer else sympy.Rational(*v.as_integer_ratio()) for s, v in zip(GRID, p)] for p in points
    ]
    return torch.tensor([float(_number(function(*p))) for p in exact], dtype=torch.float64).view(_SHAPE)


def _number(value: Any) -> Any:
    return value if not isinstance(value, sympy.logic.boolalg.BooleanAtom) else bool(value)


def _small() -> st.SearchStrategy[Any]:
    return st.integers(-5, 9).map(sympy.Integer)


def _divisor() -> st.SearchStrategy[int]:
    return st.integers(1, 5)


def integers() -> st.SearchStrategy[Any]:
    return st.recursive(
        st.one_of(st.sampled_from([Q, K, X]), _small()),
        lambda e: st.one_of(
            st.builds(sympy.Add, e, e),
            st.builds(lambda a, b: a - b, e, e),
            st.builds(lambda a, n: n * a, e, st.integers(-3, 3)),
            st.builds(lambda a, n: sympy.floor(a / n), e, _divisor()),
            st.builds(lambda a, n: sympy.Mod(a, n), e, _divisor()),
            st.builds(sympy.Min, e, e),
            st.builds(sympy.Max, e, e),
            st.builds(sympy.Abs, e),
        ),
        max_leaves=5,
    )


def booleans() -> st.SearchStrategy[Any]:
    compare = st.one_of(
        *(st.builds(kind, integers(), integers()) for kind in (sympy.Le, sympy.Lt, sympy.Eq, sympy.Ne, sympy.Ge))
    )
    return st.recursive(
        compare,
        lambda e: st.one_of(st.builds(sympy.And, e, e), st.builds(sympy.Or, e, e), st.builds(sympy.Not, e)),
        max_leaves=4,
    )


def reals() -> st.SearchStrategy[Any]:
    return st.recursive(
        st.one_of(st.just(S), integers(), st.sampled_from([0.5, -1.25, 3.0]).map(sympy.Rational)),
        lambda e: st.one_of(
            st.builds(sympy.Add, e, e),
            st.builds(lambda a, n: a * sympy.Rational(1, n), e, st.integers(2, 7)),
            st.builds(lambda a, c: c * sympy.tanh(a / c), e, st.sampled_from([2, 30, 50])),
            st.builds(lambda c, a, b: sympy.Piecewise((a, c), (b, True)), booleans(), e, e),
            st.builds(sympy.Max, e, e),
        ),
        max_leaves=4,
    )
