"""A program is the same whether its model ran before, and for how long a text; and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from histories import CONVERTED, REFUSED, FilledOnce, FutureMask, Grown, History
from modules import VOCAB
from oracles import EAGER, assert_decodes
from styles import built
from torch import nn

import treespec_compiler as treespec


def run(model: nn.Module, *lengths: int) -> None:
    with torch.no_grad():
        for length in lengths:
            model(torch.arange(length)[None] % VOCAB)


def attributes(model: nn.Module) -> dict[str, Any]:
    return {f"{p}.{k}": id(v) for p, m in model.named_modules() for k, v in (vars(m) | m._buffers).items()}


@pytest.mark.family
@pytest.mark.parametrize("before", [(), (5, 16)], ids=["fresh", "ran"])
@pytest.mark.parametrize("style", CONVERTED, ids=lambda style: style.__name__)
def test_rows_are_the_models_own(style: type[History], before: tuple[int, ...]) -> None:
    model = built(style)
    run(model, *before)
    held = attributes(model)
    program = treespec.tree_program(model, options=EAGER)
    assert attributes(model) == held
    fresh = treespec.tree_program(built(style), options=EAGER)
    assert program.max_context == fresh.max_context
    assert_decodes(model, program, VOCAB, rounds=1, size=7)


def test_a_run_in_between_makes_no_other_program() -> None:
    model = built(Grown)
    program = treespec.tree_program(model, options=EAGER)
    graph = program.graph_module
    run(model, 9, 12)
    assert treespec.tree_program(model, options=EAGER) is program
    program.check_weights(contents=True)
    assert program.graph_module is graph


def test_a_filled_attribute_that_somebody_set_is_the_models_own() -> None:
    """A window in the place of the mask that forward would make."""
    model = built(FutureMask)
    mask = torch.full((64, 64), float("-inf"))
    model._future = mask.triu(1) + mask.tril(-3)  # type: ignore[assignment]
    program = treespec.tree_program(model, options=EAGER | {"max_context": 64})
    assert program.sites[0].mask.window == 3 and program.max_context == 64
    assert_decodes(model, program, VOCAB, rounds=1, size=7)


def test_one_that_somebody_sets_later_makes_another_program() -> None:
    model = built(FilledOnce)
    program = treespec.tree_program(model, options=EAGER)
    run(model, 9)
    model.table = -model.table[:64]  # type: ignore[index]
    program.check_weights(contents=True)
    assert_decodes(model, program, VOCAB, rounds=1, size=7)


@pytest.mark.family
@pytest.mark.parametrize("before", [(), (5, 16)], ids=["fresh", "ran"])
@pytest.mark.parametrize("style", REFUSED, ids=lambda style: style.__name__)
def test_refused(style: type[History], before: tuple[int, ...]) -> None:
    model = built(style)
    run(model, *before)
    with pytest.raises(treespec.Unsupported):
        treespec.tree_program(model, options=EAGER)
