"""Formulas of the specs and their printing as torch code, on grids; interpreter/check_printer.py has Triton's."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import sympy
import torch
from expressions import GRID, booleans, integers, reals, values
from hypothesis import given, settings
from printed import torch_function

from treespec_compiler.codegen.printer import TORCH, TRITON, Printer, Unprintable
from treespec_compiler.ir import formulas
from treespec_compiler.ir.formulas import CAUSAL, DISTANCES, D, H, K, Q, S
from treespec_compiler.ir.scores import changed_scores
from treespec_compiler.ir.specs import MaskSpec, PositionSpec

INDEX = torch.arange(24)
MASKS = [MaskSpec(), MaskSpec(1), MaskSpec(5), MaskSpec(100), MaskSpec(chunk=4), MaskSpec(7, chunk=3)]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_a_mask_as_a_formula(mask):
    visible = mask.visible(INDEX[:, None], INDEX[None, :])
    got = torch_function(formulas.predicate(mask), (Q, K))(INDEX[:, None], INDEX[None, :])
    assert torch.equal(got, visible)
    rest = formulas.without_causal(formulas.predicate(mask))
    assert not rest.has(CAUSAL)
    below = INDEX[None, :] <= INDEX[:, None]
    beyond = torch_function(formulas.by_distance(rest), (Q, K, D))(
        INDEX[:, None], INDEX[None, :], INDEX[:, None] - INDEX[None, :]
    )
    assert torch.equal(torch.as_tensor(beyond) & below, visible)


def test_a_causal_mask_leaves_nothing_to_check():
    assert formulas.without_causal(formulas.predicate(MaskSpec())) == sympy.true
    assert formulas.by_distance(formulas.without_causal(formulas.predicate(MaskSpec(4)))) == (D < 4)


@pytest.mark.parametrize("softcap", [0.0, 0.1, 30.0, 50.0])
@pytest.mark.parametrize("slopes", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_scores_as_formulas(softcap, slopes, bias):
    heads, far = 3, 5
    tables = {"slopes": torch.rand(heads) * slopes, "bias": torch.randn(heads, far) * bias}
    s, distance = torch.randn(heads, 24) * 40, INDEX
    expected = changed_scores(
        s, distance, softcap, tables["slopes"] if slopes else None, tables["bias"] if bias else None
    )
    function = torch_function(formulas.score(softcap, slopes, bias), (S, H, D, DISTANCES), ("slopes", "bias"))
    got = function(s, torch.arange(heads)[:, None], distance, torch.tensor(far), tables["slopes"], tables["bias"])
    torch.testing.assert_close(got.expand_as(expected), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("offset", [0, 2])
def test_positions_as_formulas(offset):
    formula = formulas.position(PositionSpec(offset, None, "embedding"))
    assert torch.equal(torch_function(formula, (Q,))(INDEX), INDEX + offset)


def test_numbers_are_exact():
    for value in (50.0, 0.1, 30.5, 1e-3, -7.25):
        assert float(formulas.number(value)) == value


@settings(max_examples=150)
@given(integers())
def test_random_integer_expressions(expr):
    got = torch_function(expr, tuple(GRID))(*GRID.values())
    assert torch.as_tensor(got).expand(values(expr).shape).tolist() == values(expr).long().tolist()


@settings(max_examples=100)
@given(booleans())
def test_random_predicates(expr):
    got = torch.as_tensor(torch_function(expr, tuple(GRID))(*GRID.values()))
    assert torch.equal(got.expand(values(expr).shape), values(expr).bool())


@settings(max_examples=100)
@given(reals())
def test_random_scores(expr):
    got = torch.as_tensor(torch_function(expr, tuple(GRID))(*GRID.values())).double()
    torch.testing.assert_close(got.expand(values(expr).shape), values(expr), rtol=1e-4, atol=1e-4)


def test_triton_code_reads_like_code():
    def printed(expr, **names):
        return Printer(TRITON, names).doprint(expr)

    assert printed(formulas.without_causal(formulas.predicate(MaskSpec(4096)))) == "q - k < 4096"
    assert (
        printed(formulas.predicate(MaskSpec(chunk=8)), k="n[None, :]")
        == "((q // 8) == (n[None, :] // 8)) & (n[None, :] <= q)"
    )
    assert printed(formulas.score(50.0)) == "50 * tanh(s / 50)"
    assert printed(S * sympy.Rational(1, 8) - 2 * Q) == "s / 8 - 2 * q"
    x = sympy.Symbol("x", integer=True)
    assert printed(sympy.floor(x / 3)) == "((x - (((x % 3) + 3) % 3)) // 3)"
    assert Printer(TORCH).doprint(sympy.floor(x / 3)) == "(x // 3)"


def test_helpers_are_reported():
    printer = Printer(TRITON)
    printer.doprint(formulas.score(0.0))
    assert printer.helpers == set()
    printer.doprint(formulas.score(3.0))
    assert printer.helpers == {"tanh"}


@pytest.mark.parametrize(
    "expr",
    [
        sympy.sin(S),
        sympy.Function("table")(H),
        S**S,
        sympy.Mod(S, 2),
        sympy.Piecewise((1, Q < 3)),
        sympy.Symbol("q") ** 0.3,
    ],
    ids=str,
)
def test_what_has_no_code_is_refused(expr):
    with pytest.raises(Unprintable, match="no code for"):
        Printer(TRITON).doprint(expr)


def test_infinity():
    formula = sympy.Piecewise((S, CAUSAL), (-sympy.oo, True))
    got = torch_function(formula, (S, Q, K))(torch.tensor(1.5), torch.tensor([3, 1]), torch.tensor([2, 2]))
    assert got.tolist() == [1.5, -math.inf]


class Truncating(int):
    """An integer as a GPU divides it: towards zero."""

    def __add__(self, other):
        return Truncating(int(self) + int(other))

    def __sub__(self, other):
        return Truncating(int(self) - int(other))

    def __mul__(self, other):
        return Truncating(int(self) * int(other))

    def __neg__(self):
        return Truncating(-int(self))

    def __floordiv__(self, other):
        return Truncating(abs(int(self)) // abs(int(other)) * (1 if (int(self) < 0) == (int(other) < 0) else -1))

    def __mod__(self, other):
        return Truncating(int(self) - int(self // other) * int(other))

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other):
        return Truncating(int(other) - int(self))


@settings(max_examples=100)
@given(integers())
def test_triton_code_is_right_where_division_truncates(expr):
    language = SimpleNamespace(
        minimum=lambda a, b: Truncating(min(a, b)),
        maximum=lambda a, b: Truncating(max(a, b)),
        abs=lambda a: Truncating(abs(int(a))),
    )
    code = Printer(TRITON).doprint(expr)
    grids = torch.broadcast_tensors(*GRID.values())
    for point, expected in zip(zip(*(g.flatten().tolist() for g in grids)), values(expr).flatten().tolist()):
        names = {s.name: Truncating(v) for s, v in zip(GRID, point)}
        assert int(eval(code, {"tl": language}, names)) == expected
