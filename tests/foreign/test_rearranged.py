"""Decoders written with einops: exact, or refused."""

from __future__ import annotations

import pytest
from modules import VOCAB
from oracles import EAGER, assert_decodes
from styles import built

import treespec_compiler as treespec

pytest.importorskip("einops")
rearranged = pytest.importorskip("rearranged")


@pytest.mark.parametrize("name", ["Rearranged", "EinsumOfEinops"])
def test_rows_are_the_models_own(name: str) -> None:
    model = built(getattr(rearranged, name))
    assert_decodes(model, treespec.tree_program(model, options=EAGER), VOCAB, rounds=2, size=9)


def test_refused() -> None:
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(built(rearranged.ReducedOverTokens), options=EAGER)
    assert refusal.value.source is not None and "rearranged.py" in refusal.value.source
