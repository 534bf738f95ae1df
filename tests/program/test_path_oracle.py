"""Oracles 1, 2, 3 and 8: every row of a tree program is the eager model's on that node's own path."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache as remember
from typing import Any

import modules
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import EAGER, TOLERANCE, assert_decodes, assert_rows, eager_row, error, random_tree
from torch import nn

import treespec_compiler as treespec
from treespec_compiler import Forest, TokenTree

pytest.importorskip("transformers")


@remember
def model_of(name: str) -> nn.Module:
    return zoo.make(name)


@remember
def program_of(name: str) -> Any:
    return treespec.tree_program(model_of(name), options=EAGER)


@pytest.mark.family
@pytest.mark.parametrize("name", zoo.TYPES)
def test_architecture(name: str) -> None:
    program = program_of(name)
    assert len(program.sites) == 2 and program.vocab_size == zoo.VOCAB
    assert_decodes(model_of(name), program, zoo.VOCAB)


@pytest.mark.rare
def test_mistral_keeps_its_window() -> None:
    assert {s.mask.window for s in program_of("mistral").sites} == {4}
    assert {s.mask.window for s in program_of("llama").sites} == {0}


def test_a_window_wider_than_the_trace_is_kept() -> None:
    model = zoo.make("mistral", sliding_window=40)
    program = treespec.tree_program(model, options=EAGER)
    assert {s.mask.window for s in program.sites} == {40}
    assert_decodes(model, program, zoo.VOCAB, rounds=1, prompt=60)


@pytest.mark.rare
def test_positions_argument() -> None:
    """The caller gives positions: they are the tree's as well."""
    model = model_of("llama")
    steps = torch.arange(9)[None]
    program = treespec.tree_program(model, example={"input_ids": steps % 5, "position_ids": steps}, options=EAGER)
    assert_decodes(model, program, zoo.VOCAB, rounds=2)


@pytest.mark.parametrize("make", [modules.NanoGPT, modules.RopeTril], ids=["nano", "rope_tril"])
def test_plain_module(make: Any) -> None:
    torch.manual_seed(1)
    model = zoo.spread(make().eval())
    program = treespec.tree_program(model, options=EAGER)
    assert program.max_context in (modules.CONTEXT, modules.CONTEXT - 1)  # a table sliced whole has no symbolic size
    assert_decodes(model, program, modules.VOCAB)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.family
def test_chain_is_plain_decoding(name: str) -> None:
    model, program = model_of(name), program_of(name)
    ids = [i * 7 % zoo.VOCAB for i in range(20)]
    cache = program.new_cache(32)
    program.prefill(ids[:5], cache)
    rows = program.verify(TokenTree.chain(ids[5:]), cache)
    with torch.no_grad():
        assert error(rows, model(torch.tensor([ids])).logits[0, 5:]) <= TOLERANCE


@pytest.mark.rare
def test_verify_again_and_commit_nothing() -> None:
    model, program = model_of("llama"), program_of("llama")
    prefix, first, second = [3, 4, 5], random_tree(11, zoo.VOCAB, 1), random_tree(13, zoo.VOCAB, 2)
    cache = program.new_cache(64)
    program.prefill(prefix, cache)
    kept = program.verify(first, cache).clone()
    program.verify(second, cache)
    assert error(program.verify(first, cache), kept) <= TOLERANCE
    cache.commit([])
    assert cache.length(0) == 3 and cache.uncommitted(0) is None
    assert_rows(model, program.verify(second, cache), second, prefix)


def test_commit_oracle_with_partial_path() -> None:
    """After a commit, verify gives what a freshly prefilled cache gives; half of a path is a path."""
    program = program_of("llama")
    tree = TokenTree([1, 2, 3, 4, 5, 6, 7], [-1, 0, 0, 2, 3, -1, 4])
    cache, fresh = program.new_cache(64), program.new_cache(64)
    program.prefill([9, 8, 7], cache)
    program.verify(tree, cache)
    path = tree.path(6)[:3]
    cache.commit(path)
    program.prefill([9, 8, 7, *(tree.tokens[i] for i in path)], fresh)
    after = random_tree(12, zoo.VOCAB, 5)
    assert error(program.verify(after, cache), program.verify(after, fresh).clone()) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_forest_equals_each_slot_alone(name: str) -> None:
    program, model = program_of(name), model_of(name)
    prefixes = {0: [1, 2, 3], 2: [4], 3: list(range(5, 30))}
    trees = {s: random_tree(size, zoo.VOCAB, s) for s, size in {0: 12, 2: 3, 3: 17}.items()}
    cache = program.new_cache(64, slots=4)
    for slot, prefix in prefixes.items():
        program.prefill(prefix, cache, slot=slot)
    for _ in range(2):
        order = [3, 0, 2]
        rows = program.verify(Forest([(s, trees[s]) for s in order]), cache)
        at, paths = 0, {}
        for slot in order:
            part, at = rows[at : at + len(trees[slot])], at + len(trees[slot])
            assert_rows(model, part, trees[slot], prefixes[slot])
            paths[slot] = trees[slot].path(len(trees[slot]) - 1)
        cache.commit(paths)
        for slot, path in paths.items():
            prefixes[slot] = prefixes[slot] + [trees[slot].tokens[i] for i in path]
            trees[slot] = random_tree(11, zoo.VOCAB, 9 + slot)


def test_a_freed_slot_is_used_again() -> None:
    program, model = program_of("llama"), model_of("llama")
    cache = program.new_cache(32, slots=2)
    program.prefill([1, 2, 3, 4, 5, 6], cache, slot=1)
    cache.free(1)
    assert cache.length(1) == 0
    assert error(program.prefill([7, 8], cache, slot=1), eager_row(model, [7, 8])) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
@pytest.mark.family
def test_chunked_prefill(name: str) -> None:
    model = model_of(name)
    chunked = treespec.tree_program(model, options={**EAGER, "prefill_chunk": 5})
    ids = [i * 5 % zoo.VOCAB for i in range(33)]
    cache = chunked.new_cache(64)
    assert error(chunked.prefill(ids[:23], cache), eager_row(model, ids[:23])) <= TOLERANCE
    assert error(chunked.prefill(ids[23:], cache), eager_row(model, ids)) <= TOLERANCE  # appends
    tree = random_tree(11, zoo.VOCAB, 3)
    assert_rows(model, chunked.verify(tree, cache), tree, ids)


@pytest.mark.parametrize("size", [70, 135])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_more_nodes_than_a_word_has_bits(name: str, size: int) -> None:
    program, model = program_of(name), model_of(name)
    tree = random_tree(size, zoo.VOCAB, size)
    cache = program.new_cache(size + 8)
    program.prefill([6, 5, 4], cache)
    rows = program.verify(tree, cache)
    nodes = sorted({0, size - 1, *range(60, 68), *random.Random(size).sample(range(size), 12)})
    assert_rows(model, rows[nodes], tree, [6, 5, 4], nodes)
    cache.commit(tree.path(size - 1))
    after = random_tree(5, zoo.VOCAB, 1)
    prefix = [6, 5, 4, *tree.path_tokens(size - 1)]
    assert_rows(model, program.verify(after, cache), after, prefix)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_extend_level_by_level_is_verify(name: str) -> None:
    program = program_of(name)
    full = TokenTree([1, 2, 3, 4, 5, 6, 7, 8, 9], [-1, -1, 0, 0, 1, 2, 2, 4, 5])
    cache = program.new_cache(64)
    program.prefill([11, 12, 13], cache)
    whole = program.verify(full, cache).clone()
    parts, start = [], 0
    for stop in (2, 5, 8, 9):
        tree = TokenTree(full.tokens[:stop], full.parents[:stop])
        parts.append(program.extend(tree, cache, start=start).clone())
        start = stop
    assert error(torch.cat(parts), whole) <= TOLERANCE
    cache.commit(full.path(8))
    assert cache.length(0) == 3 + len(full.path(8))


def test_extend_in_a_forest() -> None:
    program, model = program_of("llama"), model_of("llama")
    trees = {0: random_tree(9, zoo.VOCAB, 1), 1: random_tree(6, zoo.VOCAB, 2)}
    cache = program.new_cache(64, slots=2)
    for slot in (0, 1):
        program.prefill([slot + 1, 2], cache, slot=slot)
    cut = {0: 4, 1: 3}
    program.verify(Forest([(s, TokenTree(t.tokens[: cut[s]], t.parents[: cut[s]])) for s, t in trees.items()]), cache)
    rows = program.extend(Forest(trees.items()), cache, start=cut)
    assert_rows(model, rows[:5], trees[0], [1, 2], range(4, 9))
    assert_rows(model, rows[5:], trees[1], [2, 2], range(3, 6))


def test_bfloat16_is_near() -> None:
    model = zoo.make("llama").to(torch.bfloat16)
    program = treespec.tree_program(model, options=EAGER)
    cache = program.new_cache(32)
    row = program.prefill([3, 1, 4], cache)
    assert row.dtype is torch.bfloat16 and error(row, eager_row(model, [3, 1, 4])) <= 5e-2


@st.composite
def sessions(draw: Any) -> Iterator[Any]:
    """A prompt and a few rounds of (tree, node whose path is committed, how much of it)."""
    token = st.integers(0, zoo.VOCAB - 1)
    rounds = []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, 8))
        tree = TokenTree(
            draw(st.lists(token, min_size=size, max_size=size)), [draw(st.integers(-1, i - 1)) for i in range(size)]
        )
        path = tree.path(draw(st.integers(0, size - 1)))
        rounds.append((tree, path[: draw(st.integers(0, len(path)))]))
    return draw(st.lists(token, min_size=1, max_size=9)), rounds


@settings(max_examples=10)
@given(session=sessions(), name=st.sampled_from(["llama", "gpt2"]))
def test_random_sessions(session: Any, name: str) -> None:
    model, program = model_of(name), program_of(name)
    prefix, rounds = session
    cache = program.new_cache(64)
    program.prefill(prefix, cache)
    for tree, path in rounds:
        assert_rows(model, program.verify(tree, cache), tree, prefix)
        cache.commit(path)
        prefix = prefix + [tree.tokens[i] for i in path]
