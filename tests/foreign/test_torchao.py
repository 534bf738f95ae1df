"""Modules whose weights torchao quantized: the program computes what they do, stored as narrow, and follows changes.

Collected where torchao is installed (`conftest.py`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import EAGER, assert_rows, random_tree
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    quantize_,
)
from torchao.quantization.quant_primitives import MappingType
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import spread

import treespec_compiler as treespec
from treespec_compiler.capture.quantized_weights import as_expression
from treespec_compiler.capture.weight_ref import WeightRef
from treespec_compiler.codegen import cpu
from treespec_compiler.errors import Refusal, StaleCache, Unsupported
from treespec_compiler.ir.stored_weights import Dequantized, headers_of
from treespec_compiler.ir.weights import Join, Slice

VOCAB, WIDTH = 23, 32
PROMPT = [3, 1, 4, 1, 5]
INT4 = torch.int4
CONFIGS = {
    "int8": (Int8WeightOnlyConfig(), "i8"),
    "int4 in groups": (IntxWeightOnlyConfig(weight_dtype=INT4, granularity=PerGroup(32)), "i4"),
    "int4 in rows": (IntxWeightOnlyConfig(weight_dtype=INT4, granularity=PerAxis(0)), "i4"),
    "int3": (IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerGroup(32)), "i4"),
    "int4 from a zero point": (
        IntxWeightOnlyConfig(weight_dtype=INT4, granularity=PerGroup(32), mapping_type=MappingType.ASYMMETRIC),
        "i8",
    ),
    "int8 from a zero point": (
        IntxWeightOnlyConfig(granularity=PerGroup(32), mapping_type=MappingType.ASYMMETRIC),
        "float32",
    ),
}
configs = pytest.mark.parametrize("config", CONFIGS)


def tiny(config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A Llama of one layer, quantized."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = spread(LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_hidden_layers=1, **sizes)).eval()).to(dtype)
    quantize_(model, config)
    return model


def assert_is_module(model: nn.Module, program: Any) -> None:
    cache = program.new_cache(64)
    program.prefill(PROMPT, cache)
    tree = random_tree(9, VOCAB, 0)
    assert_rows(model, program.verify(tree, cache).clone(), tree, PROMPT)


def weight_of(config: Any, dtype: torch.dtype) -> tuple[Any, Dequantized, dict[str, torch.Tensor]]:
    """A quantized weight [64, 96], what it is read as, and the tensors inside of it."""
    torch.manual_seed(1)
    layer = nn.Linear(96, 64).to(dtype)
    quantize_(layer, config)
    made, refs = as_expression(WeightRef("w", layer.weight, layer._parameters, "weight"))
    assert isinstance(made, Dequantized)
    return layer.weight, made, {ref.name: ref.tensor for ref in refs}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@configs
def test_it_is_read_as_the_values_it_stands_for(config: str, dtype: torch.dtype) -> None:
    weight, made, tensors = weight_of(CONFIGS[config][0], dtype)
    built = made.build(tensors.__getitem__)
    assert built.dtype is made.dtype is dtype and tuple(built.shape) == made.shape
    assert torch.equal(built, weight.dequantize())
    assert str(made) == "dequantized(w.qdata)" and made.sources[0] == "w.qdata"


@configs
def test_steps_are_known_of_what_is_made_of_it(config: str) -> None:
    _, made, tensors = weight_of(CONFIGS[config][0], torch.float32)
    form = CONFIGS[config][1]
    for part in (made, Join((made, made)), Slice(made, 0, 3, 40), Slice(made, 1, 32, 96)):
        found = headers_of(part, tensors.__getitem__)
        assert (found is None) == (form == "float32")
        if found is not None:
            assert found.form == form and found.bytes.shape == (part.shape[0], part.shape[1] // 32, 4)


@pytest.mark.skipif(not cpu.load(), reason="no C++ compiler")
@pytest.mark.parametrize(
    "config", ["int8", *(pytest.param(name, marks=pytest.mark.rare) for name in CONFIGS if name != "int8")]
)
def test_it_computes_what_the_module_does(config: str) -> None:
    how, form = CONFIGS[config]
    model = tiny(how)
    program = treespec.tree_program(model, options=EAGER)
    assert set(program.packed_bytes.forms) == {form}
    assert program.memory.model < 14_000, "two bytes a weight or so, and the table in float32"
    assert_is_module(model, program)
    if config == "int8":
        assert_it_follows(model, program)


def assert_it_follows(model: Any, program: Any) -> None:
    """Changes of the tensors inside; the tensor itself exchanged; swapped as `Module.to` does."""
    graph, cache = program.graph_module, program.new_cache(16)
    model.lm_head.weight.qdata.neg_()
    with pytest.raises(StaleCache):
        program.prefill(PROMPT, cache)
        model.model.layers[0].mlp.up_proj.weight.scale.data.mul_(1.5)
        program.prefill(PROMPT, program.new_cache(16))
        program.verify(treespec.TokenTree([1], [-1]), cache)
    assert_is_module(model, program)
    model.lm_head.weight = tiny(CONFIGS["int8"][0], seed=5).lm_head.weight
    assert_is_module(model, program)
    torch.utils.swap_tensors(model.lm_head.weight, tiny(CONFIGS["int8"][0], seed=6).lm_head.weight)
    assert_is_module(model, program)
    assert program.graph_module is graph, "other values are no other program"
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.dequantize() * 2)
    assert_is_module(model, program)
    assert program.graph_module is not graph


@pytest.mark.rare
def test_in_sixteen_bits_roundings_alone_differ() -> None:
    model = tiny(CONFIGS["int8"][0], torch.bfloat16)
    program = treespec.tree_program(model, options=EAGER)
    row = program.prefill(PROMPT, program.new_cache(16)).float()
    want = model(torch.tensor([PROMPT])).logits[0, -1].float()
    assert row.dtype is torch.float32 and (row - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.rare
def test_without_kernels_it_is_read_as_plain_weights() -> None:
    model = tiny(CONFIGS["int4 in groups"][0])
    assert_is_module(model, treespec.tree_program(model, options={**EAGER, "kernels": "aten"}))


def changed(attribute: str, value: Any) -> Any:
    model = tiny(Int8WeightOnlyConfig())
    setattr(model.lm_head.weight, attribute, value)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: tiny(Int8DynamicActivationInt8WeightConfig()), "with act_quant_kwargs: what it is multiplied with"),
        (lambda: changed("act_pre_scale", torch.ones(WIDTH)), "with act_pre_scale: what it is multiplied with"),
        (lambda: changed("zero_point", torch.ones(VOCAB, 1, dtype=torch.int8)), "zero points its own product leaves"),
        (lambda: tiny(Float8WeightOnlyConfig()), "more than those with integers times scales"),
        (lambda: tiny(Int8WeightOnlyConfig(), torch.bfloat16).float(), "stands for"),
    ],
)
def test_what_is_more_than_integers_and_scales_is_refused(make: Any, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason) as refused:
        treespec.tree_program(make(), options=EAGER)
    assert (refused.value.kind is Refusal.SUBCLASS and "lm_head" in str(refused.value)) or "layers" in str(
        refused.value
    )
