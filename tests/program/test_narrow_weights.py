"""Programs whose weights are stored in fewer bits: the same logits bit by bit, and what happens when weights change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from modules import DIM, VOCAB, RopeTril, Tiny
from oracles import EAGER, TOLERANCE, assert_decodes, eager_row, error
from torch import Tensor, nn
from zoo import spread

import treespec_compiler as treespec
from treespec_compiler import TokenTree
from treespec_compiler.codegen import cpu
from treespec_compiler.errors import StaleCache

pytestmark = [pytest.mark.converts, pytest.mark.skipif(not cpu.load(), reason="no C++ compiler")]

PROMPT = [3, 1, 4, 1, 5]


def rounded(model: nn.Module, dtype: torch.dtype = torch.bfloat16, only: str = "") -> Any:
    """The model with weights that came from 16 bits."""
    for name, parameter in model.named_parameters():
        if only in name:
            parameter.data.copy_(parameter.data.to(dtype))
    return model.eval()


def in_blocks(weight: Tensor) -> Tensor:
    """The nearest numbers of four bits with a step and a minimum in float16, as GGUF's Q4_1 stores them."""
    groups = weight.reshape(-1, 32)
    low, high = groups.aminmax(dim=1, keepdim=True)
    d, m = ((high - low) / 15).half().float(), low.half().float()
    return ((groups - m) / d).round().clamp(0, 15).mul(d).add(m).view_as(weight)


def tiny(cls: type[Tiny] = RopeTril) -> Any:
    torch.manual_seed(0)
    return spread(cls().eval())


def logits(model: nn.Module, **options: Any) -> Tensor:
    program = treespec.tree_program(model, options={**EAGER, **options})
    cache = program.new_cache(32)
    first = program.prefill(PROMPT, cache).clone()
    return torch.cat([first[None], program.verify(TokenTree([2, 7, 9, 2], [-1, 0, 0, 1]), cache)])


@pytest.mark.family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_those_of_float32_storage(dtype: torch.dtype) -> None:
    model = rounded(tiny(), dtype)
    assert torch.equal(logits(model), logits(model, weights="float32"))
    narrow, wide = (treespec.tree_program(model, options={**EAGER, "weights": w}) for w in ("exact", "float32"))
    name = str(dtype).removeprefix("torch.")
    assert set(wide.packed_bytes.forms) == {"float32"}
    assert narrow.packed_bytes.forms[name] * 2 <= wide.packed_bytes and name in repr(narrow.packed_bytes)
    assert sum(narrow.packed_bytes.forms.values()) == narrow.packed_bytes
    assert_decodes(model, narrow, VOCAB, rounds=1)


@pytest.mark.rare
def test_blocks_are_found_in_the_values() -> None:
    model = tiny()
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.shape[1] % 32 == 0:
            parameter.data.copy_(in_blocks(parameter.data))
    program = treespec.tree_program(model, options=EAGER)
    assert "q4_1" in program.packed_bytes.forms
    assert torch.equal(logits(model), logits(model, weights="float32"))
    assert_decodes(model, program, VOCAB, rounds=1)


def test_products_of_one_input_are_joined_by_form() -> None:
    """One of three came from 16 bits: it is stored so, the others as they are."""

    class Three(Tiny):
        def setup(self) -> None:
            self.a, self.b, self.c = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))

        def finish(self, x: Tensor) -> Tensor:
            return self.head(self.a(x) + self.b(x) * self.c(x))

    model = rounded(tiny(Three), only="b.weight")
    program = treespec.tree_program(model, options=EAGER)
    texts = [str(made) for made in program.state.weights.derived.values()]
    assert "pack(join(b.weight), bfloat16)" in texts and "pack(join(a.weight, c.weight))" in texts
    assert torch.equal(logits(model), logits(model, weights="float32"))


def tied() -> Any:
    """A model whose head is the embedding's matrix."""
    model = tiny()
    model.head.weight = model.embed.weight
    return model


def reads(program: Any, name: str) -> int:
    return sum(name in str(node.target) for node in program.graph_module.graph.nodes)


@pytest.mark.family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.rare
def test_a_tied_table_is_there_once(dtype: torch.dtype) -> None:
    model = rounded(tied(), dtype)
    program = treespec.tree_program(model, options=EAGER)
    assert reads(program, "packed_embedding") == 1
    assert "head.weight" not in map(program.state.weights.label, program.state.weights)
    lone = treespec.tree_program(rounded(tiny(), dtype), options=EAGER)
    assert reads(lone, "packed_embedding") == 0 and lone.packed_bytes == program.packed_bytes
    assert_decodes(model, program, VOCAB, rounds=1)
    before = logits(model)
    assert torch.equal(before, logits(model, weights="float32"))
    model.embed.weight.data.neg_()
    assert error(program.prefill(PROMPT, program.new_cache(16)), eager_row(model, PROMPT)) <= TOLERANCE


@pytest.mark.rare
def test_a_table_that_is_packed_with_others_is_read_as_it_is() -> None:
    """Two products of one input are one, whose rows are not the table's alone."""

    class Two(RopeTril):
        def finish(self, x: Tensor) -> Tensor:
            return self.head(x) + self.embed.weight.sum() * nn.functional.linear(x, self.embed.weight, self.head.bias)

    model = tiny(Two)
    program = treespec.tree_program(model, options=EAGER)
    assert reads(program, "packed_linear") and reads(program, "packed_embedding") == 0
    assert_decodes(model, program, VOCAB, rounds=1)


@pytest.mark.rare
def test_values_that_no_longer_fit_make_the_program_anew() -> None:
    model = rounded(tiny())
    program = treespec.tree_program(model, options=EAGER)
    cache = program.new_cache(32)
    program.prefill(PROMPT, cache)
    graph = program.graph_module
    with torch.no_grad():
        model.head.weight.add_(0.1)
    with pytest.raises(StaleCache, match="another form"):
        program.verify(TokenTree([1], [-1]), cache)
    assert program.graph_module is not graph and "float32" in program.packed_bytes.forms
    assert error(program.prefill(PROMPT, program.new_cache(16)), eager_row(model, PROMPT)) <= TOLERANCE


@pytest.mark.rare
def test_other_values_of_the_same_form_are_packed_again() -> None:
    model = rounded(tiny())
    program = treespec.tree_program(model, options=EAGER)
    graph = program.graph_module
    model.head.weight.data.neg_()
    assert error(program.prefill(PROMPT, program.new_cache(16)), eager_row(model, PROMPT)) <= TOLERANCE
    assert program.graph_module is graph


@pytest.mark.rare
def test_refresh_takes_a_narrower_form() -> None:
    model = tiny()
    program = treespec.tree_program(model, options=EAGER)
    assert set(program.packed_bytes.forms) == {"float32"}
    before = program.packed_bytes
    rounded(model)
    assert error(program.prefill(PROMPT, program.new_cache(16)), eager_row(model, PROMPT)) <= TOLERANCE
    assert program.packed_bytes == before, "the form holds its new values: nothing is compiled"
    program.refresh()
    assert program.packed_bytes < before and "bfloat16" in program.packed_bytes.forms
    assert error(program.prefill(PROMPT, program.new_cache(16)), eager_row(model, PROMPT)) <= TOLERANCE


@pytest.mark.rare
def test_a_kernel_that_knows_no_forms_is_given_float32() -> None:
    """Of the kernels, only one that takes the argument `form` is asked for it."""
    model = rounded(tiny())
    program = treespec.tree_program(model, options={**EAGER, "kernels": "aten"})
    assert program.packed_bytes == 0 and repr(program.packed_bytes) == "0 bytes"


@pytest.mark.rare
@pytest.mark.family
@pytest.mark.slow
@pytest.mark.parametrize("weights", ["exact", "float32"])
def test_inductor_calls_the_product_with_its_form(weights: str) -> None:
    """Its caches are kept from run to run: what they hold of an op with another schema must not be found."""
    model = rounded(tiny())
    options = {"weights": weights, "lowering": "inductor"}
    assert torch.equal(logits(model, **options), logits(model, **options))
    assert error(logits(model, **options)[0], eager_row(model, PROMPT)) <= TOLERANCE
