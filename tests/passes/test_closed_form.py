"""Closed forms against brute force: each form, evaluated on a 9 x 9 grid, is what running the graph gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from treespec_compiler.passes.forms.closed_form import ClosedForms, Form, axis
from treespec_compiler.passes.forms.rules import trunc

GRID = 9


def trace(function: Callable[[Tensor], Tensor], constants: dict[str, Tensor] | None = None) -> fx.GraphModule:
    """`function(ids)` with ids [1, T], T symbolic."""
    return make_fx(function, tracing_mode="symbolic", pre_dispatch=True)(torch.zeros(1, 11, dtype=torch.int64))


def form_of(function: Callable[[Tensor], Tensor]) -> tuple[Form | None, sympy.Symbol, ClosedForms]:
    gm = trace(function)
    tokens = next(n for n in gm.graph.nodes if n.op == "placeholder")
    forms = ClosedForms(gm, {}, (), tokens.name)
    output = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    return forms.of(output), tokens.meta["val"].shape[1].node.expr, forms


def assert_agrees(function: Callable[[Tensor], Tensor], tokens: int = GRID) -> Form:
    """Every element of the form's value for `tokens` tokens."""
    form, length, forms = form_of(function)
    assert form is not None
    expected = function(torch.zeros(1, tokens, dtype=torch.int64))
    shape = [int(s.xreplace({length: sympy.Integer(tokens)})) for s in form.shape]
    assert shape == list(expected.shape)
    for place in torch.cartesian_prod(*(torch.arange(s) for s in shape)).view(-1, len(shape)).tolist():
        at = {axis(i): sympy.Integer(p) for i, p in enumerate(place)} | {length: sympy.Integer(tokens)}
        value = sympy.sympify(form.expr).xreplace(at)
        value = value.replace(
            lambda e: isinstance(e, sympy.core.function.AppliedUndef),
            lambda e: sympy.Rational(str(forms.tables[str(e.func)][tuple(int(a) for a in e.args)].item())),
        )
        value = sympy.simplify(value.replace(lambda e: isinstance(e, trunc), lambda e: sympy.Integer(int(e.args[0]))))
        got: Any = bool(value) if value in (sympy.true, sympy.false) else float(value)
        assert got == pytest.approx(expected[tuple(place)].item()), (place, form.expr)
    return form


def steps(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1])


def pairs(ids: Tensor) -> tuple[Tensor, Tensor]:
    return steps(ids)[:, None], steps(ids)[None, :]


def square(ids: Tensor, value: float = 1.0) -> Tensor:
    return torch.full((ids.shape[1], ids.shape[1]), value)


def halves() -> Tensor:
    return (torch.arange(40) / 7).to(torch.bfloat16)


SINGLE: dict[str, Callable[[Tensor], Tensor]] = {
    "arange": steps,
    "arange from": lambda x: torch.arange(2, x.shape[1] + 2),
    "arange by two": lambda x: torch.arange(0, 2 * x.shape[1], 2),
    "the last": lambda x: 2 * steps(x).max()[None] + 1,
    "the first": lambda x: (5 - pairs(x)[0] * 3 + pairs(x)[1]).min()[None],
    "the largest difference": lambda x: (pairs(x)[0] - pairs(x)[1]).amax()[None],
    "counted ones": lambda x: torch.ones_like(x).cumsum(1) - 1,
    "differences": lambda x: torch.diff(steps(x), prepend=torch.tensor([0])),
    "remainder": lambda x: steps(x) % 4,
    "floor": lambda x: steps(x) // 4,
    "floor of a negative": lambda x: (steps(x) - 5) // 3,
    "remainder of a negative": lambda x: (steps(x) - 5) % 3,
    "divide": lambda x: steps(x) / 8,
    "clamp": lambda x: steps(x).clamp(2, 5),
    "reverse subtraction": lambda x: 3 - steps(x),
    "rounded toward zero": lambda x: ((steps(x) - 4) / 4).to(torch.int64),
    "slice from": lambda x: torch.arange(x.shape[1] + 3)[3:],
    "slice by two": lambda x: torch.arange(2 * x.shape[1])[1::2],
    "abs": lambda x: (steps(x) - 4).abs(),
    "minimum": lambda x: torch.minimum(steps(x), 8 - steps(x)),
    "boolean counted": lambda x: (steps(x) >= 3).to(torch.int64) * 2,
    "index by itself": lambda x: (steps(x) * 3)[steps(x)],
    "slice of a table in half precision": lambda x: halves()[3 : x.shape[1] + 3],
    "table in half precision read at": lambda x: halves()[steps(x) + 2],
}


@pytest.mark.parametrize("name", SINGLE)
def test_index_arithmetic(name: str) -> None:
    assert_agrees(SINGLE[name])


DOUBLE: dict[str, Callable[[Tensor], Tensor]] = {
    "causal": lambda x: pairs(x)[1] <= pairs(x)[0],
    "tril": lambda x: torch.tril(square(x)),
    "tril below": lambda x: torch.tril(square(x), -2),
    "triu": lambda x: torch.triu(square(x, -5.0), 1),
    "transposed": lambda x: torch.tril(square(x), 1).t(),
    "permuted": lambda x: torch.tril(square(x))[None].permute(0, 2, 1),
    "where": lambda x: torch.where(pairs(x)[0] > pairs(x)[1], 1.5, -2.0),
    "masked fill": lambda x: square(x).masked_fill(pairs(x)[0] < pairs(x)[1], -7.0),
    "or and not": lambda x: ~((pairs(x)[0] < 3) | (pairs(x)[1] == 2)) & (pairs(x)[0] != pairs(x)[1]),
    "flipped": lambda x: (pairs(x)[0] * 10 + pairs(x)[1]).flip(-1),
    "flipped twice": lambda x: (pairs(x)[0] * 10 + pairs(x)[1])[None].flip(0, 1),
    "expanded": lambda x: steps(x)[None].expand(x.shape[1], -1) - 1,
    "unsqueezed twice": lambda x: (pairs(x)[0] * 10 + pairs(x)[1])[None, None],
    "row": lambda x: (pairs(x)[0] * 10 + pairs(x)[1])[3],
    "last row": lambda x: (pairs(x)[0] * 10 + pairs(x)[1])[-1],
    "indexed": lambda x: (torch.arange(40) * 2)[pairs(x)[0] + pairs(x)[1]],
    "one minus": lambda x: (1 - torch.tril(square(x))) * -1e4,
}


@pytest.mark.parametrize("name", DOUBLE)
def test_tables_over_pairs(name: str) -> None:
    assert_agrees(DOUBLE[name])


NOTHING: dict[str, Callable[[Tensor], Tensor]] = {
    "content": lambda x: x + 1,
    "content in a mask": lambda x: (x != 0)[:, None, :] & (pairs(x)[1] <= pairs(x)[0]),
    "half precision counts to 2048": lambda x: steps(x).to(torch.float16),
    "bytes": lambda x: steps(x).to(torch.uint8),
    "bfloat16 arithmetic": lambda x: torch.arange(x.shape[1], dtype=torch.bfloat16) + 1,
    "table rounded after it was read": lambda x: (torch.arange(40) / 7)[steps(x)].to(torch.bfloat16),
    "counts as a table of bytes": lambda x: torch.arange(400)[steps(x)].to(torch.uint8),
    "half precision added": lambda x: halves()[steps(x)] + halves()[steps(x) + 1],
    "negative index wraps": lambda x: steps(x)[steps(x) - 1],
    "random": lambda x: torch.rand(x.shape[1]),
    "rolled": lambda x: steps(x).roll(1),
    "sum of a triangle": lambda x: torch.tril(square(x)).sum(-1),
    "running sum of counts": lambda x: steps(x).cumsum(0),
    "two dimensions made one": lambda x: (pairs(x)[0] + pairs(x)[1]).reshape(-1),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_is_guessed(name: str) -> None:
    form, _, _ = form_of(NOTHING[name])
    assert form is None


def test_the_number_of_tokens_stays_a_symbol() -> None:
    form, length, _ = form_of(lambda x: steps(x) - x.shape[1])
    assert form is not None and length in form.expr.free_symbols


Maker = Callable[[Tensor], Tensor]
_NUMBERS: list[Maker] = [lambda x: pairs(x)[0], lambda x: pairs(x)[1]]
_ARITHMETIC: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add,
    torch.sub,
    torch.minimum,
    torch.maximum,
    lambda a, b: a * 2 - b,
    lambda a, b: (a - 3) // 2 + b,
    lambda a, b: (a - b) % 3,
    lambda a, b: torch.where(a < b, a, 4),
]
_COMPARE: list[Callable[[Tensor, Tensor], Tensor]] = [torch.le, torch.lt, torch.eq, torch.ne, torch.ge, torch.gt]
_LOGIC: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.logical_and,
    torch.logical_or,
    lambda a, b: a & ~b,
    lambda a, b: torch.where(a, b, ~b),
]


@st.composite
def compositions(draw: Any) -> Maker:
    """A random boolean table over pairs."""

    def numbers(depth: int) -> Maker:
        if depth == 0:
            return draw(st.sampled_from(_NUMBERS))
        op, a, b = draw(st.sampled_from(_ARITHMETIC)), numbers(depth - 1), numbers(0)
        return lambda x: op(a(x), b(x))

    def truths(depth: int) -> Maker:
        if depth == 0:
            op, a, b = draw(st.sampled_from(_COMPARE)), numbers(draw(st.integers(0, 2))), numbers(0)
            return lambda x: op(a(x), b(x))
        logic, c, d = draw(st.sampled_from(_LOGIC)), truths(depth - 1), truths(0)
        return lambda x: logic(c(x), d(x))

    return truths(draw(st.integers(0, 2)))


@settings(max_examples=15)
@given(compositions())
def test_random_compositions(function: Maker) -> None:
    assert_agrees(function, tokens=5)
