"""Weights that are laid out anew, taken away, held outside of modules, or changed under an open cache."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from modules import DIM, VOCAB, Tiny
from oracles import EAGER, TOLERANCE, eager_row, error
from torch import Tensor, nn
from zoo import spread

import treespec_compiler as treespec
from treespec_compiler import TokenTree
from treespec_compiler.errors import InvalidPath, StaleCache

PROMPT = [3, 1, 4, 1, 5]
SCALES = {"a": [torch.ones(DIM)]}


def tiny(cls: Callable[[], nn.Module] = Tiny) -> Any:
    torch.manual_seed(0)
    return spread(cls().eval())


def wrong(program: Any, model: nn.Module) -> float:
    """Error of a fresh prefill, and of a tree behind it."""
    cache = program.new_cache(16)
    first = error(program.prefill(PROMPT, cache), eager_row(model, PROMPT))
    rows = program.verify(TokenTree([2, 7], [-1, 0]), cache)
    return max(first, error(rows[1], eager_row(model, [*PROMPT, 2, 7])))


def transposed(weight: Tensor) -> nn.Parameter:
    """Other values of the same shape, the columns in order in memory."""
    return nn.Parameter(torch.randn(weight.shape[1], weight.shape[0]).t())


class Lists(Tiny):
    """Tensors that no module registers: in a list, a dictionary, a closure, a global, and in a module in a list."""

    layers = 1

    def setup(self) -> None:
        self.listed, self.named = [torch.ones(DIM)], {"shift": torch.zeros(DIM)}
        self.hidden = [nn.Linear(DIM, DIM)]
        factor = torch.ones(DIM)

        def scaled(x: Tensor) -> Tensor:
            return x * factor

        self.scaled = scaled

    def finish(self, x: Tensor) -> Tensor:
        x = self.scaled(x * self.listed[0] + self.named["shift"]) * SCALES["a"][0]
        return self.head(self.hidden[0](x))


HELD: dict[str, Callable[[Any], Any]] = {
    "in a list": lambda m: m.listed.__setitem__(0, torch.randn(DIM)),
    "the list": lambda m: setattr(m, "listed", [torch.randn(DIM)]),
    "in a dictionary": lambda m: m.named.update(shift=torch.randn(DIM)),
    "in a closure": lambda m: setattr(m.scaled.__closure__[0], "cell_contents", torch.randn(DIM)),
    "in a global": lambda m: SCALES.update(a=[torch.randn(DIM)]),
    "in a module in a list": lambda m: setattr(m.hidden[0], "weight", nn.Parameter(torch.randn(DIM, DIM))),
    "in place": lambda m: m.listed[0].mul_(2),
}


def test_tensors_that_no_module_registers() -> None:
    model = tiny(Lists)
    program = treespec.tree_program(model, options=EAGER)
    assert wrong(program, model) <= TOLERANCE
    for name, change in HELD.items():
        before = eager_row(model, PROMPT)
        change(model)
        assert error(before, eager_row(model, PROMPT)) > 1e-3, name
        cache = program.new_cache(16)
        assert error(program.prefill(PROMPT, cache), eager_row(model, PROMPT)) <= TOLERANCE, name
    cache = program.new_cache(16)
    model.listed[0] = torch.randn(DIM)  # seen by a call as well
    assert error(program.prefill(PROMPT, cache), eager_row(model, PROMPT)) <= TOLERANCE


@pytest.mark.rare
def test_weights_laid_out_anew_under_inductor() -> None:
    """Compiled code reads weights by the strides it was compiled for."""
    model = tiny()
    program = treespec.tree_program(model, options={"kernels": "aten"})
    assert wrong(program, model) <= TOLERANCE
    model.embed.weight = transposed(model.embed.weight)
    model.qkv[0].weight = transposed(model.qkv[0].weight)
    assert wrong(program, model) <= TOLERANCE


def test_a_square_weight_that_is_transposed_in_place() -> None:
    """The same tensor, at the same address, of the same shape."""
    model = tiny()
    program = treespec.tree_program(model, options=EAGER)
    with torch.no_grad():
        model.out[0].weight.t_()
    assert model.out[0].weight.stride() == (1, DIM)
    assert wrong(program, model) <= TOLERANCE


class Biased(Tiny):
    layers = 1

    def setup(self) -> None:
        self.head = nn.Linear(DIM, VOCAB)
        self.register_buffer("shift", torch.randn(DIM))

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x if self.shift is None else x + self.shift)


def _pruned(model: Any) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(model.out[0], "weight", amount=0.6)


def _pruned_for_good(model: Any) -> None:
    from torch.nn.utils import prune

    _pruned(model)
    prune.remove(model.out[0], "weight")


def _parametrized(model: Any) -> None:
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    torch.nn.utils.parametrize.register_parametrization(model.head, "weight", Halved())


def _normed(model: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.head).parametrizations.weight.original0.data.mul_(2)


TAKEN: dict[str, Callable[[Any], Any]] = {
    "bias": lambda m: setattr(m.head, "bias", None),
    "buffer": lambda m: setattr(m, "shift", None),
    "pruned": _pruned,
    "pruned for good": _pruned_for_good,
    "parametrized": _parametrized,
    "weight norm": _normed,
}


@pytest.mark.family
@pytest.mark.parametrize("name", TAKEN)
def test_a_weight_that_is_taken_away(name: str) -> None:
    """Right again, or refused; and a cache that was open says so."""
    model = tiny(Biased)
    program = treespec.tree_program(model, options=EAGER)
    cache = program.new_cache(16)
    program.prefill(PROMPT, cache)
    before = eager_row(model, PROMPT)
    TAKEN[name](model)
    assert error(before, eager_row(model, PROMPT)) > 1e-3
    try:
        with pytest.raises(StaleCache):
            program.verify(TokenTree([2], [-1]), cache)
        assert wrong(program, model) <= TOLERANCE
    except treespec.Unsupported:
        assert name == "pruned"  # its hook sets an attribute
        with pytest.raises(treespec.Unsupported):
            program.new_cache(16)


def _fused_step(model: Any) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3, fused=True)
    model(torch.tensor([PROMPT])).square().sum().backward()
    optimizer.step()


OPEN: dict[str, Callable[[Any], Any]] = {
    "in place": lambda m: m.qkv[0].weight.requires_grad_(False).mul_(1.7),
    "replaced": lambda m: setattr(m.embed, "weight", nn.Parameter(torch.randn(VOCAB, DIM))),
    "fused optimizer": _fused_step,
}


def test_an_open_cache_of_other_weights_is_stale() -> None:
    """K/V of old weights are never mixed with new ones; a slot that is empty or freed is as good as new."""
    model = tiny()
    program = treespec.tree_program(model, options=EAGER)
    tree = TokenTree([2, 7], [-1, 0])
    for name, change in OPEN.items():
        cache = program.new_cache(16, slots=3)
        program.prefill(PROMPT, cache)
        program.verify(treespec.Forest([(0, tree), (1, tree)]), cache)
        change(model)
        with pytest.raises(StaleCache, match=r"other values"):
            program.extend(TokenTree([2, 7, 1], [-1, 0, 1]), cache, start=2)
        with pytest.raises(StaleCache):
            program.prefill([2], cache)
        for paths in ([0], {1: [0]}):
            with pytest.raises(StaleCache):
                cache.commit(paths)
        assert error(program.prefill(PROMPT, cache, slot=2), eager_row(model, PROMPT)) <= TOLERANCE, name
        cache.free(0)
        assert error(program.prefill(PROMPT, cache), eager_row(model, PROMPT)) <= TOLERANCE, name
        assert wrong(program, model) <= TOLERANCE, name


def test_equal_values_leave_a_cache_as_it_is() -> None:
    """Another tensor of the same values, and a write that changes nothing: K/V are still the model's."""
    model = tiny()
    program = treespec.tree_program(model, options=EAGER)
    cache = program.new_cache(16)
    program.prefill(PROMPT, cache)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    with torch.no_grad():
        model.embed.weight.mul_(1)
    row = program.verify(TokenTree([2], [-1]), cache)[0]
    assert error(row, eager_row(model, [*PROMPT, 2])) <= TOLERANCE


def test_only_what_changed_is_built_again() -> None:
    model = tiny()
    program = treespec.tree_program(model, options={**EAGER, "pipeline": "default,join-linears"})
    before = dict(program._made.bound.tensors)
    made = program.state.weights
    with torch.no_grad():
        model.head.weight.add_(1)
    assert wrong(program, model) <= TOLERANCE
    other = {name for name, tensor in program._made.bound.tensors.items() if tensor is not before[name]}
    assert other == {name for name in made if "head.weight" in made[name].sources} and other


def test_a_tensor_is_a_path() -> None:
    """`if path` of a tensor is the truth of its number."""
    model = tiny()
    program = treespec.tree_program(model, options=EAGER)
    cache = program.new_cache(16)
    program.prefill(PROMPT, cache)
    program.verify(TokenTree([2, 7], [-1, 0]), cache)
    for path in (torch.tensor([1]), torch.tensor([0, 5]), torch.tensor([0.0]), torch.tensor(0), torch.tensor([True])):
        with pytest.raises(InvalidPath):
            cache.commit(path)
    assert cache.length() == 5
    cache.commit(torch.tensor([0]))
    assert cache.length() == 6
    row = program.verify(TokenTree([1], [-1]), cache)[0]
    assert error(row, eager_row(model, [*PROMPT, 2, 1])) <= TOLERANCE
    cache.commit(np.array([0]))
    assert cache.length() == 7
    with pytest.raises(InvalidPath):
        program.verify(TokenTree([1], [-1]), cache)
        cache.commit(np.array([0.0]))


@pytest.mark.parametrize("circle", [False, True])
def test_nothing_keeps_weights_alive(circle: bool) -> None:
    """Dynamo keeps what it compiled until it is reset; the weights are not part of that.

    One look for garbage is enough, also where the model itself is found by it, since it holds itself.
    """
    model = tiny()
    if circle:
        model.owner = [model]
    treespec.generate(model, torch.tensor([PROMPT]), draft=None, max_new_tokens=2, options=EAGER)
    held = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert not [r for r in held if r() is not None]


def test_weights_can_be_swapped() -> None:
    """`swap_tensors` refuses a tensor with weak references; Module.to and torchao convert modules by it."""
    model = tiny()
    program = treespec.tree_program(model, options=EAGER)
    assert not [p for p in model.parameters() if weakref.getweakrefs(p)]
    torch.utils.swap_tensors(model.head.weight, nn.Parameter(torch.randn(VOCAB, DIM)))
    assert wrong(program, model) <= TOLERANCE
