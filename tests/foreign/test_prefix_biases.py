"""A bias by distance over a prompt or learned keys and the text: each row is the model's own, or it is refused."""

from __future__ import annotations

import pytest
from modules import CONTEXT, VOCAB
from oracles import EAGER, assert_decodes
from prefix_biases import CONVERTED, REFUSED, KeysAlibi
from styles import built
from torch import nn

import treespec_compiler as treespec


def _exact(style: type[nn.Module]) -> None:
    model = built(style)
    program = treespec.tree_program(model, options=EAGER)
    assert_decodes(model, program, VOCAB, rounds=2, size=9)
    assert program.max_context == CONTEXT
    assert program.sites[0].bias


def test_learned_keys_with_alibi() -> None:
    _exact(KeysAlibi)


@pytest.mark.rare
@pytest.mark.parametrize("style", [s for s in CONVERTED if s is not KeysAlibi], ids=lambda style: style.__name__)
def test_rows_are_the_models_own(style: type[nn.Module]) -> None:
    _exact(style)


@pytest.mark.rare
@pytest.mark.parametrize("style", REFUSED, ids=lambda style: style.__name__)
def test_refused(style: type[nn.Module]) -> None:
    with pytest.raises(treespec.Unsupported):
        treespec.tree_program(built(style), options=EAGER)
