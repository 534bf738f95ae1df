"""Guards on the number of tokens: a window left out where it hides nothing is proved to be the same program."""

from __future__ import annotations

import pytest
import sympy
import torch
from modules import VOCAB, Tiny
from oracles import EAGER, assert_decodes
from torch import Tensor, nn
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod
from zoo import spread

import treespec_compiler as treespec
from treespec_compiler.capture.call import EXAMPLE_TOKENS, call_spec
from treespec_compiler.options import Options
from treespec_compiler.passes.guards.numeric import of_whole_numbers
from treespec_compiler.pipeline import convert


class LeftOut(Tiny):
    """A window (or chunks) of `reach`, made only for `first` tokens and more."""

    first, reach, chunked = 8, 8, False

    def mask(self, tokens: int) -> Tensor:
        steps = torch.arange(tokens)
        seen = steps[None, :] <= steps[:, None]
        if tokens < self.first:
            return seen
        if self.chunked:
            return seen & (steps[:, None] // self.reach == steps[None, :] // self.reach)
        return seen & (steps[:, None] - steps[None, :] < self.reach)


def left_out(first: int, reach: int, chunked: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = spread(LeftOut())
    model.first, model.reach, model.chunked = first, reach, chunked  # type: ignore[assignment]
    return model.eval()


# Traced with EXAMPLE_TOKENS: at or above `first` the trace shows the window, below it does not.
CONVERTED = [(8, 7), (EXAMPLE_TOKENS, 12), (24, 24), (12, 11)]
REFUSED = [(8, 6), (12, 10), (24, 22)]


@pytest.mark.family
@pytest.mark.parametrize("chunked", [False, True], ids=["window", "chunk"])
@pytest.mark.parametrize("first, reach", CONVERTED)
def test_a_window_that_hides_nothing_below_its_guard(first: int, reach: int, chunked: bool) -> None:
    model = left_out(first, reach, chunked)
    program = treespec.tree_program(model, options=EAGER)
    assert {(s.mask.window, s.mask.chunk) for s in program.sites} == {(0, reach) if chunked else (reach, 0)}
    assert_decodes(model, program, VOCAB, rounds=2, prompt=5 if first < 20 else 17)


@pytest.mark.family
@pytest.mark.parametrize("first, reach", REFUSED)
def test_a_window_that_hides_something_below_its_guard(first: int, reach: int) -> None:
    with pytest.raises(treespec.Unsupported, match="branches on the number of tokens") as caught:
        treespec.tree_program(left_out(first, reach), options=EAGER)
    other = 2 if first <= EXAMPLE_TOKENS else first
    assert f"with {other} tokens it does something else there" in caught.value.reason


def test_a_longer_trace_takes_the_place_of_a_shorter_one() -> None:
    """Before: no window in the graph. After: the one that was left out, and no bound on the context by it."""
    model = left_out(24, 24)
    calls: list[str] = []
    windows: list[set[int]] = []

    def check(state: object, name: str) -> None:
        calls.append(name)
        windows.append({s.mask.window for s in state.sites})  # type: ignore[attr-defined]

    converted = convert(model, call_spec(model), Options.parse(EAGER), checks=[check])
    at = calls.index("discharge guards")
    assert windows[at - 1] == {0} and windows[at] == {24}
    assert converted.history.records[at].matches >= 1
    assert not any("branch" in limit.reason for limit in converted.limits)


def test_a_context_that_was_asked_for_stays_below_the_branch() -> None:
    program = treespec.tree_program(left_out(24, 4), options={**EAGER, "max_context": 23})
    assert {s.mask.window for s in program.sites} == {0} and program.max_context == 23


class OtherWeights(LeftOut):
    """As above, and below the guard one more norm: no window makes that the same."""

    def setup(self) -> None:
        self.norm = nn.LayerNorm(self.head.in_features)

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x if x.shape[1] >= 8 else self.norm(x))


def test_another_graph_is_refused_whatever_the_window() -> None:
    with pytest.raises(treespec.Unsupported, match="does something else there"):
        treespec.tree_program(OtherWeights().eval(), options=EAGER)


T = sympy.Symbol("T", integer=True, positive=True)


@pytest.mark.parametrize(
    "guard",
    [
        sympy.Eq(PythonMod(64 - Mod(T, 64), 64), 0),
        sympy.Ne(FloorDiv(T + 127, 128), 1),
        sympy.Eq(FloorDiv(3 - T, 5), -2),
        sympy.Or(T * T < 400, sympy.Not(sympy.Eq(sympy.Max(T, 50), 50))),
        sympy.Eq(sympy.Mod(4 * T, 5), 2),
    ],
    ids=str,
)
def test_a_guard_is_decided_as_sympy_does(guard: sympy.Basic) -> None:
    decide = of_whole_numbers(guard, T)
    assert decide is not None
    assert all(bool(decide(n)) == bool(guard.xreplace({T: sympy.Integer(n)})) for n in range(1, 200))


def test_what_is_no_arithmetic_of_whole_numbers_is_left_to_sympy() -> None:
    assert of_whole_numbers(sympy.sqrt(T) < 9, T) is None
    assert of_whole_numbers(T / 2 < 9, T) is None
