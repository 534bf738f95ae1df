"""Weights rounded on request: the target is the rounded model, and the program computes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import EAGER, TOLERANCE, assert_rows, eager_row, error, random_tree
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import spread

import treespec_compiler as treespec
from treespec_compiler import TokenTree
from treespec_compiler.codegen import cpu
from treespec_compiler.errors import InvalidOption, InvalidWeight, StaleCache, Unsupported
from treespec_compiler.ir.narrow import narrowest
from treespec_compiler.ir.quantize import quantized
from treespec_compiler.options import Options

pytestmark = pytest.mark.skipif(not cpu.load(), reason="no C++ compiler")
STORED = {"int8": "q8_0", "int4": "q4_0"}


VOCAB, WIDTH = 23, 32


def tiny(tied: bool = False, width: int = WIDTH) -> Any:
    """A Llama of one layer, all of whose matrices have whole blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return spread(LlamaForCausalLM(config).eval())


PROMPT = [3, 1, 4, 1, 5]


def compiled(model: nn.Module, weights: str, **options: Any) -> Any:
    return treespec.tree_program(model, options={**EAGER, "weights": weights, **options})


def assert_is_target(model: nn.Module, program: Any) -> None:
    """Every row of a tree is what the rounded model says on its path; the rows before a commit and behind it."""
    cache, prefix = program.new_cache(64), list(PROMPT)
    program.prefill(prefix, cache)
    for seed in range(2):
        tree = random_tree(9, VOCAB, seed)
        rows = program.verify(tree, cache).clone()
        with program.target():
            assert_rows(model, rows, tree, prefix)
        path = tree.path(8)
        cache.commit(path)
        prefix += [tree.tokens[node] for node in path]


@pytest.mark.family
@pytest.mark.parametrize("weights", STORED)
def test_it_computes_the_rounded_model(weights: str) -> None:
    model = tiny()
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    program = compiled(model, weights)
    assert set(program.packed_bytes.forms) == {STORED[weights]}
    assert_is_target(model, program)
    row = program.prefill(PROMPT, program.new_cache(16))
    assert error(row, eager_row(model, PROMPT)) > TOLERANCE, "the module itself was not rounded"
    assert all(torch.equal(own[name], tensor) for name, tensor in model.state_dict().items())
    with program.target():
        levels = model.lm_head.weight.view(-1, 32)
        assert max(len(block.unique()) for block in levels) <= {"int8": 32, "int4": 16}[weights]


@pytest.mark.rare
def test_greedy_output_is_the_rounded_models_own() -> None:
    model = tiny()
    options = {**EAGER, "weights": "int4"}
    got = treespec.generate(model, PROMPT, max_new_tokens=12, draft="ngram", options=options)
    ids = list(PROMPT)
    with treespec.tree_program(model, options=options).target():
        for _ in range(12):
            ids.append(int(eager_row(model, ids).argmax()))
    assert got.sequences.tolist() == [ids]


@pytest.mark.rare
def test_a_tied_table_is_one_matrix() -> None:
    model = tiny(tied=True)
    program = compiled(model, "int8")
    assert any("packed_embedding" in str(node.target) for node in program.graph_module.graph.nodes)
    with program.target():
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_is_target(model, program)


@pytest.mark.rare
def test_transposed_weights_are_rounded_along_what_is_summed() -> None:
    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.across = tiny(), nn.Parameter(torch.randn(VOCAB, 64))
            self.back = nn.Parameter(torch.randn(64, VOCAB))

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids).logits @ self.across @ self.back

    model = Across().eval()
    program = compiled(model, "int8")
    with program.target():
        columns = model.back.detach().t().reshape(-1, 32)
        levels = columns / (columns.abs().amax(1, keepdim=True) / 127)
        assert torch.allclose(levels, levels.round(), atol=1e-3)
        assert model.across.unique().numel() > 1000, "23 inputs are no whole block"
    assert_is_target(model, program)


@pytest.mark.rare
def test_new_values_are_rounded_anew() -> None:
    model = tiny()
    program = compiled(model, "int8")
    graph = program.graph_module
    model.lm_head.weight.data.neg_()
    assert_is_target(model, program)
    assert program.graph_module is graph
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    with pytest.raises(StaleCache):
        cache = program.new_cache(16)
        program.prefill(PROMPT, cache)
        with torch.no_grad():
            model.lm_head.weight.mul_(2.0)
        program.verify(TokenTree([1], [-1]), cache)
    assert_is_target(model, program)


@pytest.mark.rare
def test_running_within_the_target_changes_nothing() -> None:
    """What is rounded already is rounded to itself."""
    model = tiny()
    program = compiled(model, "int4")
    before = program.prefill(PROMPT, program.new_cache(16)).clone()
    with program.target():
        assert torch.equal(program.prefill(PROMPT, program.new_cache(16)), before)
    assert torch.equal(program.prefill(PROMPT, program.new_cache(16)), before)


def test_the_meaning_holds_after_every_pass() -> None:
    compiled(tiny(), "int8", verify_each="semantic")


@pytest.mark.rare
def test_a_saved_program_is_found(tmp_path: Path) -> None:
    model = tiny()
    first = compiled(model, "int8", program_cache=str(tmp_path))
    rows = first.prefill(PROMPT, first.new_cache(16)).clone()
    again = compiled(tiny(), "int8", program_cache=str(tmp_path))
    assert torch.equal(rows, again.prefill(PROMPT, again.new_cache(16))) and again.from_cache
    other = compiled(tiny(), "int4", program_cache=str(tmp_path))
    assert not other.from_cache


@pytest.mark.rare
def test_a_comparison_finds_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model as it is, instead of its rounded self, is not what the program computes."""
    monkeypatch.setattr("treespec_compiler.program.target.rounded", lambda state: [])
    with pytest.raises(Unsupported):
        compiled(tiny(), "int4").new_cache(16)


@pytest.mark.parametrize(
    "options", [{"on_unsupported": "fallback"}, {"kernels": "aten"}, {"mesh": "tp=2"}, {"weights": "int2"}]
)
def test_what_cannot_go_together_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption):
        Options.parse({"weights": "int8", **options})


def test_a_model_without_a_whole_block_is_refused() -> None:
    with pytest.raises(InvalidOption, match="blocks of 32"):
        compiled(tiny(width=16), "int8")


@pytest.mark.rare
def test_a_matrix_in_a_list_is_refused() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.own = tiny(), [torch.randn(WIDTH, VOCAB), torch.randn(VOCAB, WIDTH)]

        def forward(self, ids: Tensor) -> Tensor:
            first, second = self.own
            return self.inner(ids).logits @ second @ first

    with pytest.raises(InvalidOption, match="no attribute of a module"):
        compiled(Listed().eval(), "int8")


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(InvalidOption, match="weights"):
        compiled(tiny().bfloat16(), "int8")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e9])
def test_values_without_a_step_are_refused(value: float) -> None:
    weight = torch.randn(4, 64)
    weight[1, 7] = value
    with pytest.raises(InvalidWeight, match="finite"):
        quantized(weight, "int8")


@pytest.mark.rare
def test_a_model_with_such_values_is_refused() -> None:
    model = tiny()
    model.lm_head.weight.data[0, 0] = 1e9
    with pytest.raises(InvalidWeight):
        compiled(model, "int8")


@given(
    st.lists(st.floats(-6e4, 6e4, width=32), min_size=32, max_size=32),
    st.sampled_from([1e-7, 1e-3, 1.0]),
    st.sampled_from(sorted(STORED)),
)
def test_rounded_blocks_are_found_and_stay(values: list[float], scale: float, weights: str) -> None:
    block = torch.tensor(values).mul(scale).view(1, 32)
    made = quantized(block, weights)
    assert narrowest(made) in (STORED[weights], "q4_0", "q4_1")
    assert torch.equal(quantized(made, weights), made)
    step = block.abs().max() / (127 if weights == "int8" else 7)
    assert (made - block).abs().max() <= step * 1.01 + 2**-24
