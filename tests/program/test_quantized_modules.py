"""Weights that are subclasses of integers and scales, as torchao's are: read as these, followed, or refused by name.

A stand-in for torchao's class, which takes seconds to import; tests/foreign/test_torchao.py takes the library itself.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from oracles import EAGER, assert_rows, random_tree
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import spread

import treespec_compiler as treespec
from treespec_compiler import TokenTree
from treespec_compiler.codegen import cpu
from treespec_compiler.errors import Refusal, StaleCache, Unsupported

VOCAB, WIDTH = 23, 32
PROMPT = [3, 1, 4, 1, 5]


class Int8Tensor(Tensor):
    """Rows of integers, each with a scale."""

    qdata: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls: type, qdata: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=scale.dtype, device=qdata.device)

    def __init__(self, qdata: Tensor, scale: Tensor) -> None:
        self.qdata, self.scale, self.zero_point = qdata, scale, torch.zeros_like(scale, dtype=torch.int8)
        self.act_quant_kwargs = self.act_quant_scale = self.act_quant_zero_point = self.act_pre_scale = None

    @classmethod
    def of(cls, weight: Tensor) -> Int8Tensor:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.qdata.to(x.dtype) * weight.scale, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is torch.ops.aten.detach.default, function
        return cls(args[0].qdata, args[0].scale)


class Other(Int8Tensor):
    pass


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torchao.quantization")
    module.Int8Tensor = Int8Tensor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao.quantization", module)


def tiny(kind: type[Int8Tensor] = Int8Tensor, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = spread(LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_hidden_layers=1, **sizes)).eval())
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(kind.of(layer.weight.detach()), requires_grad=False)
    return model


def assert_is_module(model: nn.Module, program: Any) -> None:
    cache = program.new_cache(64)
    program.prefill(PROMPT, cache)
    tree = random_tree(9, VOCAB, 0)
    assert_rows(model, program.verify(tree, cache).clone(), tree, PROMPT)


@pytest.mark.skipif(not cpu.load(), reason="no C++ compiler")
def test_it_computes_what_the_module_does_and_follows_it() -> None:
    model = tiny()
    program = treespec.tree_program(model, options=EAGER)
    assert set(program.packed_bytes.forms) == {"i8"}
    assert program.memory.model < 14_000, "two bytes a weight or so, and the table in float32"
    assert_is_module(model, program)
    graph, cache = program.graph_module, program.new_cache(16)
    program.prefill(PROMPT, cache)
    model.lm_head.weight.qdata.neg_()
    with pytest.raises(StaleCache):
        program.verify(TokenTree([1], [-1]), cache)
    assert_is_module(model, program)
    model.lm_head.weight.scale.data.mul_(1.5)  # counts no version
    assert_is_module(model, program)
    model.lm_head.weight = tiny(seed=5).lm_head.weight
    assert_is_module(model, program)
    torch.utils.swap_tensors(model.lm_head.weight, tiny(seed=6).lm_head.weight)
    assert_is_module(model, program)
    assert program.graph_module is graph, "other values are no other program"
    model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, WIDTH))
    assert_is_module(model, program)
    assert program.graph_module is not graph


@pytest.mark.rare
def test_without_kernels_it_is_read_as_plain_weights() -> None:
    model = tiny()
    assert_is_module(model, treespec.tree_program(model, options={**EAGER, "kernels": "aten"}))


def changed(attribute: str, value: Any) -> Any:
    model = tiny()
    setattr(model.lm_head.weight, attribute, value)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: changed("act_quant_kwargs", "per row"), "with act_quant_kwargs: what it is multiplied with"),
        (lambda: changed("act_pre_scale", torch.ones(WIDTH)), "with act_pre_scale: what it is multiplied with"),
        (lambda: changed("zero_point", torch.ones(VOCAB, 1, dtype=torch.int8)), "zero points its own product leaves"),
        (lambda: tiny(Other), "a tensor subclass: capture reads plain tensors only"),
    ],
)
def test_what_is_more_than_integers_and_scales_is_refused(make: Any, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason) as refused:
        treespec.tree_program(make(), options=EAGER)
    assert refused.value.kind is Refusal.SUBCLASS and str(refused.value.node).endswith("weight")
