"""Caches take memory for what lies in them: rows stay the eager model's while pages grow, and after they have grown."""

from __future__ import annotations

from typing import Any

import modules
import pytest
import torch
from oracles import EAGER, assert_rows, random_tree
from torch import nn

import treespec_compiler as treespec
from treespec_compiler import Forest
from treespec_compiler.program import cache as caches


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "FIRST_PAGE", 8)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return modules.RopeTril().eval()


@pytest.mark.family
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_rows_while_pages_grow(small_pages: None, lowering: str) -> None:
    model = _model()
    program = treespec.tree_program(model, options={"lowering": lowering})
    cache = program.new_cache(max_tokens=60, slots=2)
    prefixes = {0: [1, 2, 3], 1: [4, 5]}
    sizes = [cache.page_size]
    for slot, ids in prefixes.items():
        program.prefill(ids, cache, slot)
    for step in range(6):
        trees = {slot: random_tree(5, modules.VOCAB, 10 * step + slot) for slot in prefixes}
        rows = program.verify(Forest(list(trees.items())), cache).clone()
        grown = program.extend(Forest(list(trees.items())), cache, start={0: 3, 1: 2}).clone()
        for (slot, tree), found, again in zip(trees.items(), rows.split(5), grown.split([2, 3]), strict=True):
            assert_rows(model, found, tree, prefixes[slot])
            assert_rows(model, again, tree, prefixes[slot], list(range(len(tree) - len(again), len(tree))))
        paths = {slot: tree.path(len(tree) - 1) for slot, tree in trees.items()}
        cache.commit(paths)
        for slot, path in paths.items():
            prefixes[slot] = prefixes[slot] + [trees[slot].tokens[i] for i in path]
        sizes.append(cache.page_size)
    assert sizes[0] == 8 and sizes[-1] >= 16 and sizes == sorted(sizes)
    assert cache.bytes == 2 * cache.page_size * sum(site.bytes_per_token() for site in program.sites)


def test_a_long_prompt_grows_at_once_and_no_further_than_asked(small_pages: None) -> None:
    program = treespec.tree_program(_model(), options=EAGER)
    cache = program.new_cache(max_tokens=40)
    program.prefill([1] * 39, cache)
    assert cache.page_size == 39
    with pytest.raises(treespec.errors.CacheOverflow, match="at most 40"):
        program.prefill([1, 1], cache)


def test_pages_that_grow_in_inference_mode_are_written_outside_of_it(small_pages: None) -> None:
    program = treespec.tree_program(_model(), options=EAGER)
    cache = program.new_cache(max_tokens=40)
    with torch.inference_mode():
        program.prefill([1] * 12, cache)
    program.verify(treespec.TokenTree.chain([1, 2]), cache)
    cache.commit([0])


class Endless(modules.Tiny):
    """No position table: the context is unlimited."""

    def positions(self, ids: Any) -> Any:
        return 0


def test_more_new_tokens_than_memory() -> None:
    torch.manual_seed(0)
    model = Endless()
    first = int(treespec.generate(model, [1, 2], max_new_tokens=1, options=EAGER).sequences[0, -1])
    out = treespec.generate(model, [1, 2], max_new_tokens=10**12, eos_token_id=first, options=EAGER)
    assert out.sequences.tolist() == [[1, 2, first]] and out.stats.finish_reason == "eos"
