"""Branches that ask whether anything is picked are taken where that shows nothing, and refused where it does."""

from __future__ import annotations

import pytest
from decoders import Style
from modules import VOCAB
from oracles import EAGER, assert_decodes
from picks import CONVERTED, REFUSED
from styles import built

import treespec_compiler as treespec
from treespec_compiler.errors import Refusal


@pytest.mark.family
@pytest.mark.parametrize("style", CONVERTED, ids=lambda style: style.__name__)
def test_rows_are_the_models_own(style: type[Style]) -> None:
    model = built(style)
    assert_decodes(model, treespec.tree_program(model, options=EAGER), VOCAB, rounds=2, size=9)


KINDS = (Refusal.CONTROL, Refusal.NO_GRAPH, Refusal.MASK, Refusal.BRANCH)


@pytest.mark.family
@pytest.mark.parametrize("style", REFUSED, ids=lambda style: style.__name__)
def test_refused(style: type[Style]) -> None:
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(built(style), options=EAGER).new_cache(8)
    assert refusal.value.kind in KINDS, refusal.value
