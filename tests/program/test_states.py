"""States beside K/V: every row is the eager model's, whatever was committed, grown, freed, or run beside it."""

from __future__ import annotations

import random

import pytest
import sharded
import torch
from oracles import EAGER, TOLERANCE, assert_decodes, assert_rows, eager_row, error, random_tree
from state_cases import lfm2, lfm2_program

import treespec_compiler as treespec
from treespec_compiler import Forest, TokenTree
from treespec_compiler.errors import Refusal, Unsupported
from treespec_compiler.program.states import FIRST_ROWS

pytest.importorskip("transformers")
VOCAB = 40


@pytest.mark.rare
def test_sites_of_both_kinds() -> None:
    program = lfm2_program()
    assert len(program.sites) == 2 and [s.shape[0] for s in program.states] == [2, 2]
    assert "2 states" in repr(program)


@pytest.mark.parametrize("prompt", [1, 2, 3, 9])
@pytest.mark.parametrize("size", [11, 80])
def test_three_rounds(prompt: int, size: int) -> None:
    assert_decodes(lfm2(), lfm2_program(), lfm2_program().vocab_size, size=size, prompt=prompt)


def test_a_prompt_in_pieces() -> None:
    program = treespec.tree_program(lfm2(), options={**EAGER, "prefill_chunk": 3})
    assert_decodes(lfm2(), program, program.vocab_size, rounds=1, prompt=10)


def test_grown_level_by_level() -> None:
    program, model = lfm2_program(), lfm2()
    tree = TokenTree([5, 6, 7, 8, 9, 10, 11], [-1, 0, 0, 1, 2, 2, 5])
    cache = program.new_cache(64)
    program.prefill([3, 1, 4], cache)
    for start, end in ((0, 1), (1, 3), (3, 6), (6, 7)):
        part = TokenTree(tree.tokens[:end], tree.parents[:end])
        rows = program.extend(part, cache, start=start)
        assert_rows(model, rows, part, [3, 1, 4], range(start, end))
    cache.commit(tree.path(6)[:3])
    path = [3, 1, 4, *(tree.tokens[n] for n in tree.path(6)[:3])]
    assert_rows(model, program.verify(tree, cache), tree, path)


def test_nothing_committed_and_other_trees_tried() -> None:
    program, model = lfm2_program(), lfm2()
    first, second = random_tree(12, 40, 1), random_tree(9, 40, 2)
    cache = program.new_cache(64)
    assert_rows(model, program.verify(first, cache), first, [])
    assert_rows(model, program.verify(second, cache), second, [])
    cache.commit([])
    assert_rows(model, program.verify(first, cache), first, [])
    cache.commit(first.path(5))
    prefix = [first.tokens[n] for n in first.path(5)]
    assert_rows(model, program.verify(second, cache), second, prefix)


def test_a_freed_slot_begins_anew_and_the_others_stay() -> None:
    program, model = lfm2_program(), lfm2()
    cache = program.new_cache(64, slots=3)
    prefixes = {0: [1, 2, 3], 1: [4], 2: [5, 6, 7, 8]}
    for slot, prefix in prefixes.items():
        program.prefill(prefix, cache, slot)
    trees = {s: random_tree(6 + s, 40, s) for s in prefixes}
    program.verify(Forest([*trees.items()]), cache)
    cache.free(1)
    prefixes[1] = [9, 9]
    program.prefill([9, 9], cache, 1)
    cache.commit({0: trees[0].path(4), 2: []})
    prefixes[0] += [trees[0].tokens[n] for n in trees[0].path(4)]
    rows = program.verify(Forest([(s, trees[s]) for s in (2, 0, 1)]), cache)
    at = 0
    for slot in (2, 0, 1):
        assert_rows(model, rows[at : at + len(trees[slot])], trees[slot], prefixes[slot])
        at += len(trees[slot])


def test_trees_and_prompts_in_one_call() -> None:
    program, model = lfm2_program(), lfm2()
    cache = program.new_cache(64, slots=2)
    program.prefill([1, 2], cache, 0)
    tree = random_tree(7, 40, 3)
    rows, last = program.mixed([(0, tree, 0)], [(1, [4, 5, 6])], cache)
    assert_rows(model, rows, tree, [1, 2])
    assert error(last, eager_row(model, [4, 5, 6])) <= TOLERANCE
    _, last = program.mixed([(0, tree, 0)], [(1, [7])], cache)
    assert error(last, eager_row(model, [4, 5, 6, 7])) <= TOLERANCE


def test_the_stash_grows_and_is_shared() -> None:
    program, model = lfm2_program(), lfm2()
    cache = program.new_cache(512, slots=2)
    before = cache.bytes
    tree = random_tree(FIRST_ROWS + 40, 40, 5)
    program.prefill([3], cache, 1)
    small = random_tree(4, 40, 6)
    program.verify(Forest([(1, small)]), cache)
    assert_rows(model, program.verify(tree, cache), tree, [])
    grown = cache.bytes - before
    assert grown == FIRST_ROWS * sum(s.bytes_per_node() for s in program.states)
    cache.commit({1: small.path(2)})
    cache.commit(tree.path(30))
    program.verify(Forest([(0, small), (1, tree)]), cache)
    assert cache.bytes - before == grown  # the rows of what was committed are used again


def test_pages_are_not_shared() -> None:
    program, model = lfm2_program(), lfm2()
    cache = program.new_cache(64, slots=2, page_size=4)
    ids = [7, 3, 11, 2, 19, 23, 5, 5, 8, 1]
    program.prefill(ids, cache, 0)
    assert cache.shared_with(ids) == 0 and cache.adopt(1, ids) == 0
    assert error(program.prefill(ids, cache, 1), eager_row(model, ids)) <= TOLERANCE
    tree = random_tree(8, 40, 1)
    program.verify(Forest([(1, tree)]), cache)
    cache.commit({1: tree.path(5)})
    ids = ids + [tree.tokens[n] for n in tree.path(5)]
    assert_rows(model, program.verify(Forest([(1, tree)]), cache), tree, ids)


@pytest.mark.parametrize("draft", ["ngram", "suffix", "self"])
def test_generated_ids_are_the_model_s(draft: str) -> None:
    model, prompt = lfm2(), [2, 3, 4, 2, 3, 4, 2, 3]
    wanted = prompt[:]
    for _ in range(14):
        wanted.append(int(eager_row(model, wanted).argmax()))
    drafts = model if draft == "self" else draft
    out = treespec.generate(model, prompt, draft=drafts, max_new_tokens=14, options=EAGER, eos_token_id=())
    assert out.sequences[0].tolist() == wanted


def test_sampled_tokens_follow_the_model() -> None:
    """Recursive rejection accepts or draws anew: over many seeds, the next token has the model's distribution."""
    model, prompt, draws = lfm2(), [2, 3, 4, 2, 3], 300
    wanted = torch.softmax(eager_row(model, prompt) / 0.5, -1)
    likely = wanted.topk(3).indices.tolist()
    counts = dict.fromkeys(likely, 0)
    for seed in range(draws):
        out = treespec.generate(
            lfm2_program(), prompt, draft="ngram", max_new_tokens=2, temperature=0.5, seed=seed, eos_token_id=()
        )
        first = int(out.sequences[0, len(prompt)])
        if first in counts:
            counts[first] += 1
    for token, count in counts.items():
        p = float(wanted[token])
        assert abs(count - draws * p) < 5 * (draws * p * (1 - p)) ** 0.5 + 1


def test_an_engine_gives_each_request_what_it_gives_alone() -> None:
    model = lfm2()
    rng = random.Random(4)
    prompts = [[rng.randrange(40) for _ in range(n)] for n in (1, 2, 3, 9, 14, 14)]
    prompts[5][:9] = prompts[4][:9]
    program = lfm2_program()
    with treespec.Engine(program, draft="ngram", max_requests=3, page_size=4, options=EAGER) as engine:
        requests = [engine.add(p, max_new_tokens=4 + n, eos_token_id=()) for n, p in enumerate(prompts)]
        engine.step()
        requests[3].cancel()
        engine.run()
    for request, prompt in zip(requests, prompts, strict=True):
        wanted = prompt[:]
        for token in request.output.tokens:
            wanted.append(int(eager_row(model, wanted).argmax()))
            assert token == wanted[-1]


@pytest.mark.rare
@pytest.mark.parametrize("lowering", ["inductor"])
def test_compiled_once_for_all_sizes(lowering: str) -> None:
    program = treespec.tree_program(lfm2(), options={"lowering": lowering})
    assert_decodes(lfm2(), program, program.vocab_size, rounds=2)
    count = program.compile_count
    assert_decodes(lfm2(), program, program.vocab_size, rounds=1, size=70, prompt=2)
    assert program.compile_count == count == 1


def test_a_mesh_is_refused() -> None:
    with pytest.raises(Unsupported, match="keeps a state") as caught:
        sharded.cut(sharded.uncut(lfm2()), 2)
    assert caught.value.kind is Refusal.MESH
