"""Tables for more places than tokens, and null keys: each row of a tree is the eager model's, or it is refused."""

from __future__ import annotations

import pytest
from kept_tables import CONVERTED, REFUSED
from modules import VOCAB
from oracles import EAGER, assert_decodes
from styles import built
from torch import nn

import treespec_compiler as treespec


@pytest.mark.rare
@pytest.mark.parametrize("style", CONVERTED, ids=lambda style: style.__name__)
def test_rows_are_the_models_own(style: type[nn.Module]) -> None:
    model = built(style)
    assert_decodes(model, treespec.tree_program(model, options=EAGER), VOCAB, rounds=2, size=9)


@pytest.mark.rare
@pytest.mark.parametrize("style", REFUSED, ids=lambda style: style.__name__)
def test_refused(style: type[nn.Module]) -> None:
    with pytest.raises(treespec.Unsupported):
        treespec.tree_program(built(style), options=EAGER)
