"""What `torch.vmap` maps is written out: exact, or refused."""

from __future__ import annotations

import pytest
from decoders import Style
from mapped import CONVERTED, REFUSED
from modules import VOCAB
from oracles import EAGER, assert_decodes
from styles import built

import treespec_compiler as treespec


@pytest.mark.family
@pytest.mark.parametrize("style", CONVERTED, ids=lambda style: style.__name__)
def test_rows_are_the_models_own(style: type[Style]) -> None:
    model = built(style)
    assert_decodes(model, treespec.tree_program(model, options=EAGER), VOCAB, rounds=1, size=7)


@pytest.mark.family
@pytest.mark.parametrize("style", REFUSED, ids=lambda style: style.__name__)
def test_refused(style: type[Style]) -> None:
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(built(style), options=EAGER)
    assert refusal.value.source is not None and "tests/foreign/" in refusal.value.source
