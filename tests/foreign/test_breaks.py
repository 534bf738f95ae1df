"""What Dynamo cannot trace and what has no effect is left out of a trace; everything else is refused."""

from __future__ import annotations

import pytest
import torch
from breaks import CONVERTED, REFUSED, Break, Raises, TellsOfNan, look
from modules import VOCAB
from oracles import EAGER, assert_decodes
from styles import built
from torch import nn

import treespec_compiler as treespec
from treespec_compiler.errors import Refusal


@pytest.mark.family
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("style", CONVERTED, ids=lambda style: style.__name__)
def test_rows_are_the_models_own(style: type[Break]) -> None:
    model = built(style)
    program = treespec.tree_program(model, options=EAGER)
    graph = program.graph_module
    assert_decodes(model, program, VOCAB, rounds=1, size=7)
    assert treespec.tree_program(model, options=EAGER).graph_module is graph


@pytest.mark.parametrize("style", REFUSED, ids=lambda style: style.__name__)
def test_refused(style: type[Break]) -> None:
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(built(style), options=EAGER)
    assert refusal.value.kind is Refusal.CONTROL
    assert refusal.value.source is not None and "breaks.py" in refusal.value.source


def test_the_models_code_keeps_its_checks() -> None:
    model = built(Raises)
    treespec.tree_program(model, options=EAGER)
    with pytest.raises(ValueError, match="got 99"):
        model(torch.tensor([[1, 99]]))


@pytest.mark.rare
def test_a_function_with_other_code_is_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(TellsOfNan)
    program = treespec.tree_program(model, options=EAGER)
    graph = program.graph_module

    def other(x: torch.Tensor) -> None:
        x.mul_(2)

    monkeypatch.setattr(look, "__code__", other.__code__)
    program.check_weights(contents=True)
    assert program.graph_module is not graph
    assert_decodes(model, program, VOCAB, rounds=1, size=7)


@pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_wrappers_are_looked_through(wrapper: object) -> None:
    model = built(Break)
    wrapped = wrapper(torch.compile(model))  # type: ignore[operator]
    assert treespec.tree_program(wrapped, options=EAGER) is treespec.tree_program(model, options=EAGER)
