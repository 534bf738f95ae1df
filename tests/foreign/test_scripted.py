"""TorchScript inside a decoder: its ops are read from its own graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from modules import DIM, VOCAB
from oracles import EAGER, assert_decodes
from scripted import CONVERTED, REFUSED, FeedForward, Part, Traced
from styles import built
from torch import Tensor, nn

import treespec_compiler as treespec


@pytest.mark.family
@pytest.mark.parametrize("style", CONVERTED, ids=lambda style: style.__name__)
def test_rows_are_the_models_own(style: type[Part]) -> None:
    model = built(style)
    assert_decodes(model, treespec.tree_program(model, options=EAGER), VOCAB, rounds=1, size=7)
    assert isinstance(model.more, torch.jit.ScriptModule) or style.__name__ == "InALayer"


@pytest.mark.family
@pytest.mark.parametrize("style", REFUSED, ids=lambda style: style.__name__)
def test_refused(style: type[Part]) -> None:
    with pytest.raises(treespec.Unsupported):
        treespec.tree_program(built(style), options=EAGER)


@pytest.mark.rare
def test_what_changes_is_noticed() -> None:
    model = built(Part)
    first = treespec.tree_program(model, options=EAGER)
    assert treespec.tree_program(model, options=EAGER) is first

    def same_as_the_model() -> Any:
        program = treespec.tree_program(model, options=EAGER)
        assert_decodes(model, program, VOCAB, rounds=1, size=5)
        return program

    model.more.times = 3
    same_as_the_model()
    other = FeedForward().eval()
    nn.init.normal_(other.layers[0].weight)
    model.more = torch.jit.script(other)
    same_as_the_model()


def test_a_model_that_is_torchscript_itself() -> None:
    inner = built(Traced)
    script: Any = torch.jit.trace(inner, torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(script, options=EAGER)
    assert "self.inner = model" in (refusal.value.way_out or "")
    model = Outer(script)
    assert_decodes(model, treespec.tree_program(model, options=EAGER), VOCAB, rounds=1, size=7)
    fallback = EAGER | {"on_unsupported": "fallback"}
    assert treespec.generate(script, torch.tensor([[3, 1, 4]]), max_new_tokens=3, options=fallback).stats.fallback


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Any:
        return self.inner(ids)


def test_what_no_line_is_known_for_is_named() -> None:
    model = built(Part)
    model.more = torch.jit.script(nn.GRU(DIM, DIM, batch_first=True))
    model.finish = lambda x: model.head(model.more(x)[0])
    with pytest.raises(treespec.Unsupported):
        treespec.tree_program(model, options=EAGER)
