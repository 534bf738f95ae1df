"""Weights that change after a program was made, and programs that must not be taken for one another."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from modules import CONTEXT, DIM, HEADS, VOCAB, NanoGPT, RopeTril, Tiny
from oracles import EAGER, TOLERANCE, eager_row, error
from torch import Tensor, nn
from zoo import spread

import treespec_compiler as treespec
from treespec_compiler import TokenTree
from treespec_compiler.errors import StaleCache

PROMPT = [3, 1, 4, 1, 5]


def tiny(cls: Callable[[], nn.Module] = Tiny, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return spread(cls().eval())


def wrong(program: Any, model: nn.Module) -> float:
    """Error of a fresh prefill."""
    return error(program.prefill(PROMPT, program.new_cache(16)), eager_row(model, PROMPT))


def _replace(model: Any) -> None:
    model.head.weight = nn.Parameter(torch.randn_like(model.head.weight))


def _module(model: Any) -> None:
    model.head = nn.Linear(DIM, VOCAB, bias=False)


def _bias(model: Any) -> None:
    model.head.bias = nn.Parameter(torch.randn(VOCAB))


def _load(model: Any) -> None:
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})


def _step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.tensor([PROMPT])).square().sum().backward()
    optimizer.step()


def _exchange_rows(model: Any) -> None:
    """Through `.data`, with the same sum over all elements."""
    model.head.weight.data.copy_(model.head.weight.data.flip(0))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda m: m.head.weight.requires_grad_(False).add_(0.5),
    "through data": lambda m: m.qkv[0].weight.data.mul_(2),
    "through data, rows exchanged": _exchange_rows,
    "parameter replaced": _replace,
    "data replaced": lambda m: setattr(m.head.weight, "data", torch.randn(VOCAB, DIM)),
    "module replaced": _module,
    "bias added": _bias,
    "state dict": _load,
    "optimizer step": _step,
    "layer norm": lambda m: m.norms[1].weight.data.mul_(3),
    "embedding": lambda m: m.embed.weight.data.neg_(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name: str) -> None:
    """Before the first cache is made, and again after it."""
    model = tiny()
    program = treespec.tree_program(model, options=EAGER)
    CHANGES[name](model)
    assert wrong(program, model) <= TOLERANCE
    before = eager_row(model, PROMPT)
    torch.manual_seed(5)
    CHANGES["through data"](model)
    assert error(before, eager_row(model, PROMPT)) > 1e-3
    assert wrong(program, model) <= TOLERANCE


def test_an_open_cache_sees_versioned_changes() -> None:
    model = tiny()
    program = treespec.tree_program(model, options=EAGER)
    cache = program.new_cache(16)
    program.prefill(PROMPT, cache)
    cache.free()
    with torch.no_grad():
        model.head.weight.add_(1)
    assert error(program.prefill(PROMPT, cache), eager_row(model, PROMPT)) <= TOLERANCE


@pytest.mark.rare
def test_generate_sees_changes_through_data() -> None:
    model = tiny()
    model.config = None
    first = treespec.generate(model, torch.tensor([PROMPT]), draft=None, max_new_tokens=4, verifier=None)
    model.head.weight.data.copy_(model.head.weight.data.flip(0))
    program = treespec.tree_program(model, options=EAGER)
    assert wrong(program, model) <= TOLERANCE
    del first


def test_tied_weights_that_come_apart() -> None:
    model = tiny(NanoGPT)
    program = treespec.tree_program(model, options=EAGER)
    assert wrong(program, model) <= TOLERANCE
    model.head.weight = nn.Parameter(torch.randn(VOCAB, DIM))
    assert wrong(program, model) <= TOLERANCE


@pytest.mark.rare
def test_a_mask_buffer_is_proved_again() -> None:
    """The proof read the buffer's values; other values need another proof, or a refusal."""
    model = tiny(RopeTril)
    program = treespec.tree_program(model, options=EAGER)
    cache = program.new_cache(16)
    model.seen.copy_(torch.ones(CONTEXT, CONTEXT).tril() * torch.ones(CONTEXT, CONTEXT).triu(-2))
    with pytest.raises(StaleCache):
        program.prefill(PROMPT, cache)
    assert program.sites[0].mask.window == 3
    assert wrong(program, model) <= TOLERANCE
    model.seen.fill_(True)
    with pytest.raises(treespec.Unsupported, match="bidirectional"):
        program.new_cache(16)


def test_an_offset_buffer_is_proved_again() -> None:
    class Offset(Tiny):
        def setup(self) -> None:
            self.register_buffer("offset", torch.tensor(2))

        def positions(self, ids: Tensor) -> Tensor:
            return self.wpe(torch.arange(ids.shape[1]) + self.offset)

    model = tiny(Offset)
    program = treespec.tree_program(model, options=EAGER)
    assert wrong(program, model) <= TOLERANCE
    model.offset.fill_(5)
    assert wrong(program, model) <= TOLERANCE


def test_a_plain_tensor_attribute() -> None:
    class Attribute(Tiny):
        def setup(self) -> None:
            self.scale = torch.ones(DIM)

        def finish(self, x: Tensor) -> Tensor:
            return self.head(x * self.scale)

    model = tiny(Attribute)
    program = treespec.tree_program(model, options=EAGER)
    model.scale = torch.randn(DIM)
    assert wrong(program, model) <= TOLERANCE


def test_another_dtype_rebuilds_and_old_caches_raise() -> None:
    model = tiny()
    program = treespec.tree_program(model, options=EAGER)
    cache = program.new_cache(16)
    program.prefill(PROMPT, cache)
    model.double()
    with pytest.raises(StaleCache, match=r"float32.*float64"):
        program.verify(TokenTree([1], [-1]), cache)
    with pytest.raises(StaleCache):
        cache.commit([])
    assert program.dtype is torch.float64
    row = program.prefill(PROMPT, program.new_cache(16))
    assert row.dtype is torch.float64 and error(row, eager_row(model, PROMPT)) <= 1e-8


def test_train_and_eval() -> None:
    model = tiny(NanoGPT)
    program = treespec.tree_program(model, options=EAGER)
    cache = program.new_cache(16)
    model.train()
    with pytest.raises(treespec.Unsupported, match="training mode"):
        program.prefill(PROMPT, cache)
    model.eval()
    assert wrong(program, model) <= TOLERANCE
    model.drop.train()  # one submodule
    with pytest.raises(treespec.Unsupported, match="dropout"):
        program.new_cache(16)
    model.eval()
    assert wrong(program, model) <= TOLERANCE


def test_refresh() -> None:
    model = tiny()
    program = treespec.tree_program(model, options=EAGER)
    cache = program.new_cache(16)
    model.qkv[1].weight.data.mul_(-1)
    program.refresh()
    assert error(program.prefill(PROMPT, cache), eager_row(model, PROMPT)) <= TOLERANCE


def test_instances_are_served_each_by_its_own() -> None:
    """Other weights, and another constant in the code: eps is no weight."""
    first, second = tiny(), tiny(seed=1)
    third = tiny()
    for norm in third.norms:
        norm.eps = 0.5
    programs = [treespec.tree_program(m, options=EAGER) for m in (first, second, third)]
    assert len({id(p) for p in programs}) == 3
    for program, model in zip(programs, (first, second, third), strict=True):
        assert wrong(program, model) <= TOLERANCE
    with pytest.raises(StaleCache, match="another"):
        programs[0].prefill(PROMPT, programs[1].new_cache(16))


def test_one_program_for_an_instance_and_its_options() -> None:
    model = tiny()
    program = treespec.tree_program(model, options=EAGER)
    assert treespec.tree_program(model, options=EAGER) is program
    assert treespec.tree_program(model, options={**EAGER, "prefill_chunk": 3}) is not program


def test_constant_arguments_are_part_of_the_program() -> None:
    class Scaled(Tiny):
        def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
            return super().forward(ids) * scale

    model = tiny(Scaled)
    ids = torch.arange(6)[None]
    rows = []
    for factor in (1.0, 2.0):
        example = {"ids": ids, "scale": torch.tensor([factor, factor]).sum()[None]}
        program = treespec.tree_program(model, example=example, options=EAGER)
        rows.append(program.prefill(PROMPT, program.new_cache(16)).clone())
    assert torch.allclose(2 * rows[0], rows[1], rtol=1e-4)


def test_hooks_and_replaced_forwards_are_part_of_the_model() -> None:
    model = tiny()
    model.register_forward_hook(lambda module, args, out: out * 3)
    assert wrong(treespec.tree_program(model, options=EAGER), model) <= TOLERANCE
    other = tiny()
    original = other.forward
    other.forward = lambda ids: original(ids) + 1
    assert wrong(treespec.tree_program(other, options=EAGER), other) <= TOLERANCE


def test_a_program_dies_with_its_model() -> None:
    model = tiny()
    program = weakref.ref(treespec.tree_program(model, options=EAGER))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None and program() is None


def test_packed_bytes_are_reported() -> None:
    program = treespec.tree_program(tiny(), options=EAGER)
    assert program.packed_bytes == 0 or program.packed_bytes >= 4 * VOCAB * DIM
    assert program.sites[0].heads == HEADS
