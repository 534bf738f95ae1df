"""The compiled program: the path oracle again, no recompilation in the loop, and the module as a plain function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from modules import VOCAB, RopeTril, Tiny
from oracles import TOLERANCE, assert_decodes, assert_rows, eager_row, error, random_tree
from torch import Tensor, nn

import treespec_compiler as treespec
from treespec_compiler import Forest, TokenTree
from treespec_compiler.backend import treespec_backend
from treespec_compiler.errors import UnknownOption
from treespec_compiler.program.lowering import compile_calls

pytest.importorskip("transformers")

pytestmark = pytest.mark.converts  # what is compiled is counted or stood in for


# By its entry point where treespec is installed; a bare checkout has none.
BACKEND: Any = "treespec" if "treespec" in torch._dynamo.list_backends(()) else treespec_backend


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return zoo.make("llama")


@pytest.fixture(scope="module")
def program(llama: nn.Module) -> Any:
    return treespec.tree_program(llama, options={"lowering": "inductor"})


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    return zoo.make("gpt2")


@pytest.fixture(scope="module")
def compiled(gpt2: nn.Module) -> Any:
    return torch.compile(gpt2, backend=BACKEND)


def test_path_oracle(llama: nn.Module, program: Any) -> None:
    assert_decodes(llama, program, zoo.VOCAB)


def test_trees_of_one_node(llama: nn.Module, program: Any) -> None:
    cache = program.new_cache(16)
    prefix: list[int] = []
    for token in (5, 9, 2):
        tree = TokenTree([token], [-1])
        assert_rows(llama, program.verify(tree, cache), tree, prefix)
        cache.commit([0])
        prefix.append(token)
    assert error(program.prefill([4], cache), eager_row(llama, [*prefix, 4])) <= TOLERANCE


def test_nothing_is_compiled_again(llama: nn.Module, program: Any) -> None:
    """Growing prefixes, other trees, several slots, other cache sizes, forests, more than 64 nodes."""
    program.verify(TokenTree([1], [-1]), program.new_cache(8))
    compiles, calls = program.compile_count, compile_calls()
    assert compiles == 1
    stances = torch.compiler.set_stance("fail_on_recompile")
    with stances:
        for capacity, slots in ((40, 1), (200, 3)):
            cache = program.new_cache(capacity, slots=slots)
            for slot in range(slots):
                program.prefill(range(1, 4 + 5 * slot), cache, slot=slot)
            for seed, size in enumerate((1, 2, 3, 8, 13)):
                trees = [(s, random_tree(size + s, zoo.VOCAB, seed)) for s in range(slots)]
                program.verify(Forest(trees), cache)
                cache.commit({s: t.path(0) for s, t in trees})
            if capacity > 100:
                program.verify(random_tree(70, zoo.VOCAB, 3), cache)
                program.verify(random_tree(130, zoo.VOCAB, 3), cache)
    assert (program.compile_count, compile_calls()) == (compiles, calls)


def test_wide_trees_and_forests_are_exact(llama: nn.Module, program: Any) -> None:
    cache = program.new_cache(160, slots=2)
    program.prefill([1, 2, 3], cache)
    program.prefill([4], cache, slot=1)
    trees = {1: random_tree(3, zoo.VOCAB, 1), 0: random_tree(130, zoo.VOCAB, 2)}
    rows = program.verify(Forest(trees.items()), cache)
    assert_rows(llama, rows[:3], trees[1], [4])
    nodes = [0, 63, 64, 65, 127, 128, 129]
    assert_rows(llama, rows[[3 + n for n in nodes]], trees[0], [1, 2, 3], nodes)


def test_weights_that_change_do_not_compile(llama: nn.Module, program: Any) -> None:
    calls = compile_calls()
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert error(program.prefill([3, 1, 4], program.new_cache(8)), eager_row(llama, [3, 1, 4])) <= TOLERANCE
    assert compile_calls() == calls


@pytest.mark.rare
def test_plain_module_with_a_mask_buffer() -> None:
    torch.manual_seed(1)
    model = zoo.spread(RopeTril(layers=1).eval())
    assert_decodes(model, treespec.tree_program(model), VOCAB, rounds=1)


class RoundsOnTheWay(Tiny):
    """To fewer bits and back, which generated code leaves out where nothing asks it not to."""

    layers = 1

    def finish(self, x: Tensor) -> Tensor:
        return self.head((x * 3.1).to(torch.bfloat16).float() - x * 3)


def test_roundings_stay() -> None:
    torch.manual_seed(0)
    model = zoo.spread(RoundsOnTheWay()).eval()
    assert_decodes(model, treespec.tree_program(model), VOCAB, rounds=1)


# The module as the same function of the same inputs


@pytest.mark.rare
def test_plain_calls(gpt2: nn.Module, compiled: Any) -> None:
    ids = torch.arange(24).view(2, 12) % zoo.VOCAB
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        for kwargs in ({}, {"attention_mask": mask}):
            got, expected = compiled(ids, **kwargs).logits, gpt2(ids, **kwargs).logits
            shown = mask.bool() if kwargs else slice(None)
            assert error(got[shown], expected[shown]) <= TOLERANCE
        cached = compiled(ids, use_cache=True)
        assert cached.past_key_values is not None
        assert error(cached.logits, gpt2(ids, use_cache=True).logits) <= TOLERANCE


@pytest.mark.rare
def test_training_gives_the_same_gradients() -> None:
    torch.manual_seed(2)
    model = zoo.spread(RopeTril(layers=1))
    ids = torch.arange(14).view(2, 7) % VOCAB

    def gradients(call: Any) -> dict[str, Tensor]:
        model.zero_grad()
        call(ids).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    model.train()
    expected = gradients(model)
    got = gradients(torch.compile(model, backend=BACKEND))
    for name, value in expected.items():
        assert torch.allclose(got[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max() + 1)), name


@pytest.mark.rare
def test_tree_program_of_a_compiled_module(gpt2: nn.Module, compiled: Any) -> None:
    options = {"lowering": "eager"}
    assert treespec.tree_program(compiled, options=options) is treespec.tree_program(gpt2, options=options)


@pytest.mark.rare
def test_tree_program_of_a_module_compiled_in_place() -> None:
    torch.manual_seed(3)
    model = zoo.spread(RopeTril(layers=1).eval())
    expected = eager_row(model, [3, 1, 4])
    model.compile(backend=BACKEND, options={"lowering": "eager"})
    program = treespec.tree_program(model, options={"lowering": "eager"})
    assert error(program.prefill([3, 1, 4], program.new_cache(8)), expected) <= TOLERANCE
    assert error(eager_row(model, [3, 1, 4]), expected) <= TOLERANCE


def test_unknown_option() -> None:
    model = torch.compile(RopeTril(layers=1), backend=BACKEND, options={"lowerng": "eager"})
    with pytest.raises((UnknownOption, torch._dynamo.exc.BackendCompilerFailed), match="Did you mean 'lowering'"):
        model(torch.ones(1, 3).long())
