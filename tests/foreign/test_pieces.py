"""A text of one piece is no loop: it converts, for texts of no more than a piece. Pieces that are computed alike and
joined again are computed together, whatever their number, up to eight of them."""

from __future__ import annotations

import pytest
from modules import CONTEXT, VOCAB
from oracles import EAGER, assert_decodes
from pieces import CONVERTED, JOINED, PIECE, REFUSED, PiecesAlone, QueriesInALoop
from styles import built
from torch import nn

import treespec_compiler as treespec


@pytest.mark.rare
@pytest.mark.parametrize("style", CONVERTED, ids=lambda style: style.__name__)
def test_rows_are_the_models_own(style: type[nn.Module]) -> None:
    model = built(style)
    program = treespec.tree_program(model, options=EAGER)
    alone = style in (PiecesAlone, QueriesInALoop)  # what is done to two pieces is not seen to be the same
    assert program.max_context == PIECE if alone else program.max_context > PIECE
    assert_decodes(model, program, VOCAB, rounds=1, size=9)


@pytest.mark.rare
@pytest.mark.parametrize("style", JOINED, ids=lambda style: style.__name__)
def test_pieces_are_joined_again(style: type[nn.Module]) -> None:
    model = built(style)
    program = treespec.tree_program(model, options=EAGER)
    assert program.max_context == CONTEXT
    assert_decodes(model, program, VOCAB, rounds=2, size=9)


@pytest.mark.family
@pytest.mark.parametrize("style", REFUSED, ids=lambda style: style.__name__)
def test_refused(style: type[nn.Module]) -> None:
    with pytest.raises(treespec.Unsupported):
        treespec.tree_program(built(style), options=EAGER)
