"""Masks in every spelling: a decoder with each is exact, or refused."""

from __future__ import annotations

import pytest
from masks import CONVERTED, REFUSED, Mask
from modules import VOCAB, Tiny
from oracles import EAGER, assert_decodes
from torch import Tensor

import treespec_compiler as treespec
from treespec_compiler.errors import Refusal


class Masked(Tiny):
    layers = 1

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.written = mask

    def mask(self, tokens: int) -> Tensor:
        return self.written(tokens)


@pytest.mark.family
@pytest.mark.parametrize("name", CONVERTED)
def test_rows_are_the_models_own(name: str) -> None:
    model = Masked(CONVERTED[name])
    assert_decodes(model, treespec.tree_program(model, options=EAGER), VOCAB, rounds=1, size=9, prompt=11)


@pytest.mark.family
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(Masked(REFUSED[name]), options=EAGER)
    assert refusal.value.kind in (Refusal.MASK, Refusal.LENGTH)
