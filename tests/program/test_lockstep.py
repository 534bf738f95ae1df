"""The path oracle on all ranks of a mesh at once, in this process: every row of every rank is the eager model's."""

from __future__ import annotations

import pytest
import torch
from sharded import LATER, assert_ranks_decode, cut, stages, uncut
from zoo import VOCAB

from treespec_compiler.cli.coverage.models import tiny_model
from treespec_compiler.errors import PassError
from treespec_compiler.passes.sharding.summary import summary
from treespec_compiler.program.lockstep import Lockstep

# type -> products cut by outputs and by inputs, and all_reduces, of its two layers at 2 ranks
SAMPLE = {
    "llama": (11, 4, 4),
    "gpt2": (5, 4, 4),  # fused q, k, v; transposed weights; biases
    "bloom": (5, 4, 4),  # ALiBi; q, k, v interleaved by head
    "opt": (9, 4, 4),
    "gemma2": (11, 4, 4),  # softcaps, windows, norms of sums
    "mixtral": (9, 4, 4),  # experts by feature
    "gpt_neox": (5, 4, 2),  # attention and MLP side by side: one sum a layer
    "qwen3": (11, 4, 4),  # norms of q and k
    "phi3": (5, 4, 4),  # q, k, v and gate, up fused
    "gpt_oss": (9, 4, 4),  # sinks; gates and ups in turn
}


@pytest.mark.family
@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_ranks_together_say_what_the_model_says(name: str) -> None:
    model = tiny_model(name)
    whole = uncut(model)
    two = cut(whole, 2)
    found = summary(two)
    assert (found.products["column"], found.products["row"], found.count("all_reduce")) == SAMPLE[name]
    assert found.count("all_gather") == 1 and found.whole_sites == 0
    assert_ranks_decode(model, two, VOCAB)
    for ranks in (3, 4):
        assert_ranks_decode(model, cut(whole, ranks), VOCAB, rounds=1)
    assert_ranks_decode(model, cut(whole, 2, later=LATER), VOCAB, rounds=1)


@pytest.mark.family
@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.rare
def test_stages_together_say_what_the_model_says(name: str) -> None:
    model = tiny_model(name)
    whole = uncut(model)
    for mesh in ("pp=2", "tp=2,pp=2"):
        assert_ranks_decode(model, stages(whole, mesh), VOCAB, rounds=1)


@pytest.mark.rare
def test_ranks_that_differ_are_an_error() -> None:
    model = tiny_model("gpt2", vocab_size=95)  # no halves: each rank has the whole head
    ranks = Lockstep(cut(uncut(model), 2), 64)
    name = next(name for name, made in ranks.state.weights.items() if made.sources[0].endswith("ln_f.weight"))
    ranks.weights[1][name] = torch.zeros_like(ranks.weights[1][name])
    with pytest.raises(PassError, match="ranks with different logits"):
        ranks.prefill([1, 2, 3])
