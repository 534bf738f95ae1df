"""A query's product with a vector of the distance: every row is the model's own, or the model is refused."""

from __future__ import annotations

import pytest
from distances import CONVERTED, REFUSED, Clipped, ProjectedSines, Shifted, TokensFirst
from modules import CONTEXT, VOCAB
from oracles import EAGER, assert_decodes
from styles import built

import treespec_compiler as treespec


def _model_and_rows(style: type[Clipped], context: int) -> None:
    model = built(style)
    program = treespec.tree_program(model, options=EAGER)
    assert_decodes(model, program, VOCAB, rounds=2, size=9)
    assert "r[q - k]" in program.sites[0].bias
    assert program.max_context == context


@pytest.mark.parametrize("style", CONVERTED, ids=lambda style: style.__name__)
def test_rows_are_the_models_own(style: type[Clipped]) -> None:
    _model_and_rows(style, CONTEXT if issubclass(style, Shifted) else 2048)


@pytest.mark.rare
@pytest.mark.parametrize("style", [ProjectedSines, TokensFirst], ids=lambda style: style.__name__)
def test_vectors_that_are_computed_from_distances(style: type[Clipped]) -> None:
    _model_and_rows(style, 2048)


@pytest.mark.family
@pytest.mark.parametrize("style", REFUSED, ids=lambda style: style.__name__)
def test_refused(style: type[Clipped]) -> None:
    with pytest.raises(treespec.Unsupported):
        treespec.tree_program(built(style), options=EAGER)
