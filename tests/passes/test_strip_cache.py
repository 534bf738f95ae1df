"""strip native cache: models with K/V buffers of their own become stateless, or are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import native_cache as zoo
import pytest
import torch
from native_cache import CELLS, HEADS, VOCAB, WIDTH, Attention, Cache, CachedDecoder
from oracles import EAGER, TOLERANCE, error, random_tree
from pass_cases import captured, ops
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from zoo import spread

import treespec_compiler as treespec
from treespec_compiler import TokenTree, Unsupported
from treespec_compiler.ir.verify import problems
from treespec_compiler.passes import normalize
from treespec_compiler.passes import strip_native_cache as strip_cache
from treespec_compiler.passes.framework.manager import run_passes

ROLES = {"input_pos": "positions"}


def example(tokens: int = 9) -> tuple[Tensor, Tensor]:
    return torch.arange(tokens)[None] % 5, torch.arange(tokens)


def with_cache(cache: type[Cache]) -> type[CachedDecoder]:
    return type("Decoder", (CachedDecoder,), {"attention": type("Own", (Attention,), {"cache": cache})})


def built(cls: type[nn.Module], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return spread(cls(**options))


def assert_path_oracle(model: nn.Module, program: Any, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Rounds of verify and commit against a fresh copy of the model on each path."""
    fresh = copy.deepcopy(model)  # before anything ran
    ids = [3, 1, 4, 1, 5]
    cache = program.new_cache(max_tokens=CELLS)

    def expected(path: list[int]) -> Tensor:
        with torch.no_grad():
            return call(copy.deepcopy(fresh), torch.tensor([path]))[0, -1]

    assert error(program.prefill(ids, cache), expected(ids)) <= TOLERANCE
    for seed in range(3):
        tree = random_tree(11, VOCAB, seed)
        rows = program.verify(tree, cache)
        assert all(error(rows[i], expected(ids + tree.path_tokens(i))) <= TOLERANCE for i in range(len(tree)))
        path = tree.path(len(tree) - 1)
        cache.commit(path)
        ids += [tree.tokens[i] for i in path]


def at_positions(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, torch.arange(ids.shape[1]))


CONVERTED = {
    "index_put": CachedDecoder,
    "index_copy": with_cache(zoo.CopiedCache),
    "cells in dimension 1": with_cache(zoo.OuterCache),
    "as many features as cells": type("Decoder", (CachedDecoder,), {"attention": zoo.WidenedKeys}),
    "eager scores": type("Decoder", (CachedDecoder,), {"attention": zoo.EagerScores}),
}


@pytest.mark.family
@pytest.mark.parametrize("name", CONVERTED)
def test_path_oracle(name: str) -> None:
    model = built(CONVERTED[name])
    before = {n: b.clone() for n, b in model.named_buffers()}
    program = treespec.tree_program(model, example(), ROLES, {**EAGER, "verify_each": "semantic"})
    assert program.history["strip native cache"].matches == 4
    assert program.max_context == CELLS and {s.mask.window for s in program.sites} == {0}
    assert [s.kv_heads for s in program.sites] == [zoo.KV_HEADS] * 2
    assert_path_oracle(model, program, at_positions)
    for buffer, value in model.named_buffers():
        assert torch.equal(value, before[buffer]) and value._version == 0, buffer


@pytest.mark.rare
def test_a_window_of_the_mask_is_kept() -> None:
    class Windowed(CachedDecoder):
        def mask(self, input_pos: Tensor) -> Tensor:
            cells = torch.arange(CELLS)
            return (cells <= input_pos[:, None]) & (cells > input_pos[:, None] - 4)

    model = built(Windowed)
    program = treespec.tree_program(model, example(), ROLES, EAGER)
    assert {s.mask.window for s in program.sites} == {4}
    assert_path_oracle(model, program, at_positions)


@pytest.mark.rare
def test_only_the_written_part_is_read() -> None:
    class Part(with_cache(zoo.WrittenPartCache)):  # type: ignore[misc]
        def mask(self, input_pos: Tensor) -> Tensor:
            return super().mask(input_pos)[..., : input_pos.shape[0]]

    model = built(Part)
    assert_path_oracle(model, treespec.tree_program(model, example(), ROLES, EAGER), at_positions)


@pytest.mark.rare
def test_a_start_position_given_as_a_number() -> None:
    """The example starts at 0: the cache is written as a slice of the first T cells, and the same slice is read."""
    model = built(zoo.StartDecoder)
    program = treespec.tree_program(model, (example()[0], 0), options=EAGER)
    assert program.history["strip native cache"].matches == 4 + 1  # and the mask's part for the past
    assert program.max_context in (CELLS, CELLS - 1)
    assert_path_oracle(model, program, lambda m, ids: m(ids, 0))
    with pytest.raises(Unsupported, match="changes state in place"):
        treespec.tree_program(model, (example()[0], 3), options=EAGER)


@pytest.mark.rare
def test_the_model_runs_between_calls_of_the_program() -> None:
    """What the user's own calls leave in the buffers is no change of a weight."""
    model = built(CachedDecoder)
    program = treespec.tree_program(model, example(), ROLES, EAGER)
    cache, tree = program.new_cache(CELLS), TokenTree([1, 2, 3], [-1, 0, 0])
    program.prefill([5, 6], cache)
    rows = program.verify(tree, cache).clone()
    with torch.no_grad():
        model(*example())
    assert not program._made.watch.touched()
    assert torch.equal(program.verify(tree, cache), rows)
    assert treespec.tree_program(model, example(), ROLES, EAGER) is program


@pytest.mark.rare
def test_generate_gives_the_models_own_tokens() -> None:
    model = built(CachedDecoder)
    program = treespec.tree_program(model, example(), ROLES, EAGER)
    from treespec_compiler.speculation.drafts.ngram import NGramDraft

    out = treespec.generate(program, torch.tensor([[3, 1, 4]]), draft=NGramDraft(), max_new_tokens=12)
    ids = [3, 1, 4]
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(at_positions(model, torch.tensor([ids]))[0, -1].argmax()))
    assert out.sequences[0].tolist() == ids


@pytest.mark.rare
def test_before_and_after() -> None:
    state = captured(built(CachedDecoder), example(), ROLES)
    run_passes(state, [normalize.PASS])
    before = ops(state)
    assert before.count("aten.index_put") == 4 and len(state.output.args[0]) == 5
    record = next(iter(run_passes(state, [strip_cache.PASS])))
    after = ops(state)
    assert record.matches == 4 and problems(state.graph, state.level) == []
    assert "aten.index_put" not in after and len(state.output.args[0]) == 1
    assert after.count("aten.scaled_dot_product_attention") == 2
    assert after.count("aten.slice") == before.count("aten.slice") + 1  # the mask, once for both layers
    assert not [n for n in state.weights.sources if "cache" in n] and not state.written


def test_does_not_fire_without_a_cache() -> None:
    from modules import Tiny

    state = captured(Tiny())
    records = run_passes(state, [normalize.PASS, strip_cache.PASS])
    assert records["strip native cache"].matches == 0 and not records["strip native cache"].changed


def test_an_empty_past_is_dropped() -> None:
    model = built(zoo.Past)
    past = torch.zeros(1, HEADS, 0, WIDTH // HEADS)
    program = treespec.tree_program(model, (*example()[:1], past, past), options=EAGER)
    assert program.history["strip native cache"].matches == 2
    assert_path_oracle(model, program, lambda m, ids: m(ids, past, past)[0])


def test_a_past_that_holds_tokens_stays_before_every_text() -> None:
    model = built(zoo.Past)
    past = torch.randn(1, HEADS, 3, WIDTH // HEADS)
    program = treespec.tree_program(model, (*example()[:1], past, past), options=EAGER)
    cache, prefix = program.new_cache(64), [3, 1, 4, 1, 5]
    program.prefill(prefix, cache)
    tree = treespec.TokenTree([2, 7, 1, 8], [-1, 0, 0, 1])
    rows = program.verify(tree, cache)
    for node, row in enumerate(rows):
        ids = torch.tensor([prefix + tree.path_tokens(node)])
        with torch.no_grad():
            expected = model(ids, past, past)[0]
        assert torch.allclose(expected[0, -1], row, atol=1e-4)


class Shifted(Cache):
    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return super().update(input_pos + 1, k, v)


class Ring(Cache):
    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return super().update(input_pos % 16, k, v)


class Twice(Cache):
    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        super().update(input_pos, k, v)
        return super().update(input_pos, 2 * k, v)


class Summed(Cache):
    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k_cache.index_add_(2, input_pos, k)
        return self.k_cache, self.v_cache


class OneForAll(Cache):
    """Every head gets the keys of the first one."""

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return super().update(input_pos, k[:, :1], v)


class OldKeys(Cache):
    """What was in the cache before the write has a part in the keys."""

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        old = self.k_cache * 1.0
        super().update(input_pos, k, v)
        return self.k_cache + old, self.v_cache


class Averaged(Cache):
    """Keys are centred over all cells."""

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().update(input_pos, k, v)
        return k - k.mean(2, keepdim=True), v


class Decayed(Cache):
    """Old entries fade: a recurrent state, no cache."""

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k_cache.mul_(0.5)
        return super().update(input_pos, k, v)


class Counted(Cache):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.add_(1)
        return super().update(input_pos, k * self.seen, v)


class KeysOnly(Attention):
    """Values are the new ones, keys are cached."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return super().read(q, k, v.flip(2), mask)


class Unmasked(CachedDecoder):
    def mask(self, input_pos: Tensor) -> None:
        return None


class IsCausal(Attention):
    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class LateCells(CachedDecoder):
    """The last cell is visible to everyone, written or not."""

    def make_mask(self) -> Tensor:
        mask = super().make_mask()
        mask[:, -1] = True
        return mask


class Uncausal(CachedDecoder):
    def make_mask(self) -> Tensor:
        return super().make_mask().logical_not()


class WideMask(CachedDecoder):
    """A mask of 24 rows and 48 columns, whose later columns show what no token has written."""

    def make_mask(self) -> Tensor:
        mask = super().make_mask()[:24]
        mask[:, 30:] = True
        return mask


class Everything(CachedDecoder):
    """Visible: all cells below the number of tokens, for every query."""

    def mask(self, input_pos: Tensor) -> Tensor:
        return (torch.arange(CELLS) < input_pos.shape[0]).expand(input_pos.shape[0], CELLS)


REFUSED: dict[str, tuple[type[nn.Module], str]] = {
    "another cell": (with_cache(Shifted), "does not write cell t"),
    "ring buffer": (with_cache(Ring), "does not write cell t"),
    "two writes": (with_cache(Twice), "not one write"),
    "spread over heads": (with_cache(OneForAll), "spread over"),
    "sum": (with_cache(Summed), "not known as a cache"),
    "old contents": (with_cache(OldKeys), "besides the write"),
    "average over cells": (with_cache(Averaged), "outside attention"),
    "recurrent": (with_cache(Decayed), "not one write"),
    "counter": (with_cache(Counted), "not known as a cache"),
    "flipped": (type("Decoder", (CachedDecoder,), {"attention": KeysOnly}), "outside attention"),
    "no mask": (Unmasked, "no mask"),
    "is_causal": (type("Decoder", (CachedDecoder,), {"attention": IsCausal}), "is_causal=True"),
    "a cell shown to all": (LateCells, "distance"),
    "reversed mask": (Uncausal, "later token"),
    "a mask that ends early": (WideMask, "24 entries for a cache of 48 cells"),
    "a mask by length": (Everything, "every query sees every key"),
}


@pytest.mark.family
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    cls, words = REFUSED[name]
    model = built(cls, layers=1)
    before = {n: b.clone() for n, b in model.named_buffers()}
    with pytest.raises(Unsupported, match=words) as caught:
        treespec.tree_program(model, example(), ROLES, EAGER)
    assert caught.value.node or caught.value.way_out
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


@pytest.mark.rare
def test_a_context_past_the_cache_is_refused() -> None:
    model = built(CachedDecoder)
    program = treespec.tree_program(model, example(), ROLES, EAGER)
    cache = program.new_cache(2 * CELLS)
    program.prefill([1] * CELLS, cache)
    with pytest.raises(treespec.errors.ContextOverflow):
        program.verify(TokenTree([1], [-1]), cache)
