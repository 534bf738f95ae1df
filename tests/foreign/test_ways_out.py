"""What a refusal says to do is done, and the model converts."""

from __future__ import annotations

import pytest
import torch
from modules import CONTEXT, VOCAB, Tiny
from oracles import EAGER, assert_decodes
from sharded import cut, stages, uncut
from supplies import Called
from torch import nn
from ways import One, Way
from ways_of_layers import WAYS as OF_LAYERS
from ways_out import WAYS, BranchOnValues

import treespec_compiler as treespec


@pytest.mark.family
@pytest.mark.parametrize("way", WAYS + OF_LAYERS, ids=lambda way: f"{way.before.__name__}: {way.words}")
def test_the_way_out_works(way: Way) -> None:
    torch.manual_seed(0)
    model: nn.Module = way.before()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
    with pytest.raises(treespec.Unsupported) as refusal, way.around():
        treespec.tree_program(model, way.example, options=EAGER).new_cache(8)
    assert way.words in (refusal.value.way_out or ""), refusal.value
    changed = way.change(model)
    program = treespec.tree_program(changed, way.then, options=EAGER | way.options)
    assert program.max_context == way.options.get("max_context", CONTEXT)
    alone = changed if way.then is None else Called(changed, way.then)
    assert_decodes(alone, program, VOCAB, rounds=1, size=7)


@pytest.mark.family
def test_ranks_that_divide_the_model() -> None:
    state = uncut(One())
    with pytest.raises(treespec.Unsupported, match="nothing of this model can be cut for 7 ranks") as refusal:
        cut(state, 7)
    assert "choose a number of ranks that divides its heads" in (refusal.value.way_out or "")
    assert cut(state, 2).whole_groups


@pytest.mark.family
def test_fewer_stages() -> None:
    state = uncut(Tiny().eval())
    with pytest.raises(treespec.Unsupported, match="3 stages need 2 places") as refusal:
        stages(state, "pp=3")
    assert "choose fewer stages" in (refusal.value.way_out or "")
    assert len(stages(state, "pp=2")) == 2


def test_without_a_way_of_its_own_the_plain_loop_is_left() -> None:
    torch.manual_seed(0)
    model = BranchOnValues()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.generate(model, ids, max_new_tokens=4, options=EAGER)
    assert 'on_unsupported="fallback"' in refusal.value.DEFAULT_WAY_OUT
    out = treespec.generate(model, ids, max_new_tokens=4, options=EAGER | {"on_unsupported": "fallback"})
    assert out.stats.fallback
    for _ in range(4):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(out.sequences, ids)


def test_an_early_exit_that_is_there() -> None:
    torch.manual_seed(0)
    model = Tiny().eval()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with pytest.raises(treespec.TreespecError) as refusal:
        treespec.generate(model, ids, draft="early-exit:7", max_new_tokens=4, options=EAGER)
    assert "1 to 1" in str(refusal.value)
    out = treespec.generate(model, ids, draft="early-exit:1", max_new_tokens=4, options=EAGER)
    assert torch.equal(out.sequences, treespec.generate(model, ids, max_new_tokens=4, options=EAGER).sequences)
