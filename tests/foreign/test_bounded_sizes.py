"""`min` and `max` of the number of tokens take a side, and the context ends where they take the other."""

from __future__ import annotations

import pytest
from bounded_sizes import CONVERTED, REFUSED
from modules import CONTEXT, VOCAB
from oracles import EAGER, assert_decodes
from styles import built
from torch import nn

import treespec_compiler as treespec


@pytest.mark.family
@pytest.mark.parametrize("style", CONVERTED, ids=lambda style: style.__name__)
def test_rows_are_the_models_own(style: type[nn.Module]) -> None:
    model = built(style)
    program = treespec.tree_program(model, options=EAGER)
    assert program.max_context == CONTEXT
    assert_decodes(model, program, VOCAB, rounds=1, size=7)


@pytest.mark.family
@pytest.mark.parametrize("style", REFUSED, ids=lambda style: style.__name__)
def test_refused(style: type[nn.Module]) -> None:
    with pytest.raises(treespec.Unsupported):
        treespec.tree_program(built(style), options=EAGER)
