"""Rows in front of the text and behind it: each row of a tree is the eager model's, or the model is refused."""

from __future__ import annotations

import pytest
import torch
from modules import VOCAB
from oracles import EAGER, assert_decodes
from prefixes import CONVERTED, REFUSED, PrefixEmbeddings, WrittenCache
from styles import built
from torch import nn

import treespec_compiler as treespec


@pytest.mark.family
@pytest.mark.parametrize("style", CONVERTED, ids=lambda style: style.__name__)
def test_rows_are_the_models_own(style: type[nn.Module]) -> None:
    model = built(style)
    assert_decodes(model, treespec.tree_program(model, options=EAGER), VOCAB, rounds=2, size=9)


@pytest.mark.family
@pytest.mark.parametrize("style", REFUSED, ids=lambda style: style.__name__)
def test_refused(style: type[nn.Module]) -> None:
    with pytest.raises(treespec.Unsupported):
        treespec.tree_program(built(style), options=EAGER)


def test_the_table_of_positions_ends_earlier_behind_a_prefix() -> None:
    program = treespec.tree_program(built(PrefixEmbeddings), options=EAGER)
    assert program.max_context == 64  # places of the text are counted without the prefix


@pytest.mark.rare
def test_caches_in_a_list_stay_as_they_are() -> None:
    model = built(WrittenCache)
    before = [cache.clone() for cache in model.cache_k]
    program = treespec.tree_program(model, options=EAGER)
    program.prefill([1, 2, 3], program.new_cache(8))
    assert all(map(torch.equal, model.cache_k, before))
    assert program.max_context == 64
