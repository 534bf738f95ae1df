"""choose regime: values chosen by the number of tokens, buffers that are overwritten, tables made by the first call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from modules import CONTEXT, DIM, VOCAB, Tiny
from oracles import EAGER, assert_decodes
from pass_cases import captured, ops
from torch import Tensor
from zoo import spread

import treespec_compiler as treespec
from treespec_compiler import Unsupported
from treespec_compiler.ir.verify import problems
from treespec_compiler.passes import choose_regime as regimes
from treespec_compiler.passes import normalize
from treespec_compiler.passes.framework.manager import run_passes


class Scaled(Tiny):
    """The residual is scaled by one of two vectors."""

    layers = 1

    def setup(self) -> None:
        self.register_buffer("short", torch.linspace(0.5, 1.5, DIM))
        self.register_buffer("long", torch.linspace(2.0, 1.0, DIM))
        self.register_buffer("used", torch.zeros(DIM))

    def is_long(self, ids: Tensor) -> Tensor:
        return torch.arange(ids.shape[1]).max() + 1 > 20

    def scale(self, ids: Tensor) -> Tensor:
        return torch.where(self.is_long(ids), self.long, self.short)

    def start(self, ids: Tensor) -> Tensor:
        return super().start(ids) * self.scale(ids)


class Kept(Scaled):
    """What was chosen is kept in a buffer, as longrope does."""

    def scale(self, ids: Tensor) -> Tensor:
        self.used.copy_(super().scale(ids))
        return self.used


class Never(Scaled):
    """A condition that any prompt fulfils."""

    def is_long(self, ids: Tensor) -> Tensor:
        return torch.arange(ids.shape[1]).max() >= 0


class Lazy(Scaled):
    """A table made by the first call."""

    def setup(self) -> None:
        super().setup()
        self.table = None

    def scale(self, ids: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(1, DIM + 1) / DIM
        return self.table


class LazyFromWeight(Lazy):
    def scale(self, ids: Tensor) -> Tensor:
        if self.table is None:
            self.table = self.short * 2
        return self.table


CONVERTED: dict[str, tuple[type[Scaled], int]] = {
    "chosen": (Scaled, 20),
    "kept in a buffer": (Kept, 20),
    "never changes": (Never, CONTEXT),
    "made by the first call": (Lazy, CONTEXT),
    "made by the first call from a weight": (LazyFromWeight, CONTEXT),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_converts(name: str) -> None:
    cls, context = CONVERTED[name]
    model = spread(cls())
    program = treespec.tree_program(model, options=EAGER)
    assert program.max_context == context
    assert_decodes(model, program, VOCAB, rounds=1, size=9)
    cache = program.new_cache(2 * CONTEXT)
    program.prefill([1] * context, cache)
    with pytest.raises(treespec.errors.ContextOverflow):
        program.verify(treespec.TokenTree([1], [-1]), cache)


class OnlyAt(Scaled):
    """One length is special."""

    def is_long(self, ids: Tensor) -> Tensor:
        return torch.arange(ids.shape[1]).max() == 20


class ByContent(Scaled):
    def is_long(self, ids: Tensor) -> Tensor:
        return ids.max() > 20


class Running(Kept):
    """The buffer remembers: an average over calls."""

    def scale(self, ids: Tensor) -> Tensor:
        self.used.copy_(0.5 * self.used + 0.5 * self.short)
        return self.used


class OtherOnceSet(Lazy):
    """The second call is not the first one."""

    def scale(self, ids: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(1, DIM + 1) / DIM
            return self.table
        return 2 * self.table


REFUSED = {
    "one length": (OnlyAt, "number of tokens"),
    "by content": (ByContent, ""),
    "average": (Running, "changes state in place: used"),
    "other once set": (OtherOnceSet, "another branch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    cls, words = REFUSED[name]
    with pytest.raises(Unsupported) as caught:
        treespec.tree_program(spread(cls()), options=EAGER)
    assert words in str(caught.value)


def applied(model: Tiny) -> tuple[list[str], list[str], Any, Any]:
    state = captured(model)
    run_passes(state, [normalize.PASS])
    before = ops(state)
    record = next(iter(run_passes(state, [regimes.PASS])))
    assert problems(state.graph, state.level) == []
    return before, ops(state), record, state


def test_before_and_after() -> None:
    before, after, record, state = applied(Kept())
    assert record.matches == 2 and "aten.where" in before and "aten.where" not in after
    assert [limit.tokens for limit in state.limits] == [20]
    assert len(state.output.args[0]) == 1 and state.written == []
    assert not any(state.weights.label(name) in ("used", "long") for name in state.weights if state.node(name).users)


def test_does_not_fire_on_a_choice_for_each_token() -> None:
    class ForEach(Scaled):
        def scale(self, ids: Tensor) -> Tensor:
            late = torch.arange(ids.shape[1])[:, None] > 20
            return torch.where(late, self.long, self.short)

    before, after, record, _ = applied(ForEach())
    assert record.matches == 0 and not record.changed and before == after
