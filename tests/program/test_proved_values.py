"""A weight whose values a proof used: when it changes, the proof is made again, or the model is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from modules import CONTEXT, DIM, VOCAB, Tiny
from oracles import EAGER, assert_decodes
from torch import Tensor
from zoo import spread

import treespec_compiler as treespec


class Regimes(Tiny):
    """Two scales, chosen by a number of tokens that a buffer holds."""

    def setup(self) -> None:
        self.register_buffer("limit", torch.tensor(40))
        self.register_buffer("short", torch.linspace(0.5, 1.5, DIM))
        self.register_buffer("long", torch.linspace(2.0, 1.0, DIM))

    def start(self, ids: Tensor) -> Tensor:
        is_long = torch.arange(ids.shape[1]).max() + 1 > self.limit
        return super().start(ids) * torch.where(is_long, self.long, self.short)


class Offset(Tiny):
    """Positions that begin where a buffer says."""

    def setup(self) -> None:
        self.register_buffer("first", torch.tensor(0))

    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(torch.arange(ids.shape[1]) + self.first)


class Replaced(Tiny):
    """Scores that are not seen become an ordinary number, which the mask then hides."""

    def setup(self) -> None:
        self.register_buffer("seen", torch.ones(CONTEXT, CONTEXT).tril().bool())

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        seen = self.seen[: q.shape[2], : q.shape[2]]
        return (q @ k.transpose(-1, -2)).masked_fill(~seen, float("-inf")).softmax(-1) @ v


class Zeroed(Tiny):
    """Weights that are cut off after softmax, and made to sum to one again."""

    def setup(self) -> None:
        self.register_buffer("seen", torch.ones(CONTEXT, CONTEXT).tril())

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        weights = (q @ k.transpose(-1, -2)).softmax(-1) * self.seen[: q.shape[2], : q.shape[2]]
        return weights / weights.sum(-1, keepdim=True) @ v


def _band(model: Any) -> None:
    model.seen.copy_(torch.ones(CONTEXT, CONTEXT).tril().triu(-3))


def _halved(model: Any) -> None:
    model.seen[30, 7] = 0.5


CHANGES: dict[str, tuple[type[Tiny], Callable[[Any], None]]] = {
    "limit": (Regimes, lambda m: m.limit.fill_(9)),
    "offset": (Offset, lambda m: m.first.fill_(2)),
    "mask": (Replaced, _band),
    "zeros and ones": (Zeroed, _band),
    "no zero and no one": (Zeroed, _halved),
}


@pytest.mark.family
@pytest.mark.parametrize("name", CHANGES)
def test_it_is_proved_again(name: str) -> None:
    cls, change = CHANGES[name]
    model = spread(cls())
    try:
        program = treespec.tree_program(model, options=EAGER)
    except treespec.Unsupported:
        pytest.fail("refused before the change")
    assert_decodes(model, program, VOCAB, rounds=1)
    graph = program.graph_module
    change(model)
    try:
        program = treespec.tree_program(model, options=EAGER)
        assert_decodes(model, program, VOCAB, rounds=1, prompt=5, size=4 if name == "limit" else 11)
    except treespec.Unsupported:
        return
    assert program.graph_module is not graph
    assert program.max_context == {"limit": 9, "offset": CONTEXT - 2}.get(name, CONTEXT)


class EveryOther(Tiny):
    """Two tokens share a row of the table, so it lasts twice as long."""

    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(torch.arange(ids.shape[1]) // 2)


def test_a_table_that_is_read_at_a_number_made_of_the_position_ends() -> None:
    model = spread(EveryOther())
    program = treespec.tree_program(model, options=EAGER)
    assert program.max_context == 2 * CONTEXT and "position table" in program.limits[0].reason
    assert_decodes(model, program, VOCAB, rounds=1, prompt=100)
    with pytest.raises(treespec.errors.ContextOverflow, match="position table"):
        program.prefill([1] * (2 * CONTEXT + 1), program.new_cache(4 * CONTEXT))
