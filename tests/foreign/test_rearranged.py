"""Decoders written with einops: exact, or refused."""

from __future__ import annotations

import pytest
import torch
from modules import VOCAB
from oracles import EAGER, assert_decodes
from torch import nn

import treespec_compiler as treespec

pytest.importorskip("einops")
rearranged = pytest.importorskip("rearranged")


def built(style: type[nn.Module]) -> nn.Module:
    model = style()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("name", ["Rearranged", "EinsumOfEinops"])
def test_rows_are_the_models_own(name: str) -> None:
    model = built(getattr(rearranged, name))
    assert_decodes(model, treespec.tree_program(model, options=EAGER), VOCAB, rounds=2, size=9)


def test_refused() -> None:
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(built(rearranged.ReducedOverTokens), options=EAGER)
    assert refusal.value.source is not None and "rearranged.py" in refusal.value.source
