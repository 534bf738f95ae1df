"""What a refusal says to do is done, and the model converts."""

from __future__ import annotations

import pytest
import torch
from oracles import EAGER, assert_decodes
from supplies import Called
from torch import nn
from ways_out import CONTEXT, VOCAB, WAYS, Way

import treespec_compiler as treespec


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.before.__name__)
def test_the_way_out_works(way: Way) -> None:
    torch.manual_seed(0)
    model: nn.Module = way.before()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(model, way.example, options=EAGER).new_cache(8)
    assert way.words in (refusal.value.way_out or ""), refusal.value
    changed = way.change(model)
    program = treespec.tree_program(changed, way.then, options=EAGER | way.options)
    assert program.max_context == way.options.get("max_context", CONTEXT)
    alone = changed if way.then is None else Called(changed, way.then)
    assert_decodes(alone, program, VOCAB, rounds=1, size=7)
