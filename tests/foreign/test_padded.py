"""Padding that is hidden by its token: every row is the model's own, also behind and at padding, or it is refused."""

from __future__ import annotations

import pytest
import torch
from modules import VOCAB
from oracles import EAGER, assert_rows, eager_row, error
from padded import CONVERTED, PAD, REFUSED, Padded
from styles import built

import treespec_compiler as treespec
from treespec_compiler.errors import HiddenStart


@pytest.mark.parametrize("style", CONVERTED, ids=lambda style: style.__name__)
def test_rows_are_the_models_own(style: type[Padded]) -> None:
    model = built(style)
    program = treespec.tree_program(model, options=EAGER)
    assert program.padding == sorted(style.hidden)
    prefix = [11, PAD, 3, *style.hidden, 9]
    cache = program.new_cache(max_tokens=64)
    assert error(program.prefill(prefix, cache), eager_row(model, prefix)) <= 1e-4
    tree = treespec.TokenTree([4, PAD, 5, PAD, PAD, 8, style.hidden[-1], 12], [-1, -1, 0, 0, 1, 3, 2, 4])
    assert_rows(model, program.verify(tree, cache), tree, prefix)
    cache.commit([1, 4])
    tree = treespec.TokenTree([VOCAB - 1, PAD, 6], [-1, 0, 0])
    assert_rows(model, program.verify(tree, cache), tree, [*prefix, PAD, PAD])


@pytest.mark.parametrize("style", REFUSED, ids=lambda style: style.__name__)
def test_refused(style: type[Padded]) -> None:
    with pytest.raises(treespec.Unsupported):
        treespec.tree_program(built(style), options=EAGER)


def test_no_text_begins_with_padding() -> None:
    model = built(Padded)
    program = treespec.tree_program(model, options=EAGER)
    cache = program.new_cache(max_tokens=32, slots=2)
    with pytest.raises(HiddenStart):
        program.prefill([PAD, 3], cache)
    with pytest.raises(HiddenStart):
        program.verify(treespec.TokenTree([5, PAD], [-1, -1]), cache)
    with pytest.raises(HiddenStart):
        treespec.generate(model, torch.tensor([[PAD, 3]]), max_new_tokens=2, options=EAGER)
    program.prefill([3], cache)
    program.prefill([PAD], cache)
    program.verify(treespec.TokenTree([5, PAD], [-1, -1]), cache)
