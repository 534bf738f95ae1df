"""States beside K/V: every row is the eager model's, whatever was committed, grown, freed, or run beside it."""

from __future__ import annotations

import random
from typing import Any

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


@pytest.mark.rare
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


def begun(program: Any, cache: Any, slot: int, ids: list[int]) -> int:
    """Prefill a slot that begins with what others have, and compare its row; how many tokens it had."""
    found = cache.adopt(slot, ids)
    assert error(program.prefill(ids[found:], cache, slot), eager_row(lfm2(), ids)) <= TOLERANCE
    return found


IDS = [7, 3, 11, 2, 19, 23, 5, 5, 8, 1]


def test_a_beginning_is_shared_up_to_where_a_state_was_kept() -> None:
    program, model = lfm2_program(), lfm2()
    cache = program.new_cache(64, slots=3, page_size=4)
    assert begun(program, cache, 0, IDS) == 0 and len(cache.checkpoints) == 1
    assert cache.shared_with(IDS) == 2 and begun(program, cache, 1, IDS) == 8
    assert cache.page_counts.shared == 2
    tree = random_tree(8, 40, 1)
    program.verify(Forest([(1, tree), (0, tree)]), cache)
    cache.commit({1: tree.path(5), 0: tree.path(7)})  # neither moves the other's state, nor what was kept
    for slot, node in ((1, 5), (0, 7)):
        path = IDS + [tree.tokens[n] for n in tree.path(node)]
        assert_rows(model, program.verify(Forest([(slot, tree)]), cache), tree, path)
    cache.free(0)
    cache.free(1)
    assert begun(program, cache, 2, [*IDS[:8], 30, 31]) == 8  # what former slots left is found, too


def test_where_texts_part_a_state_is_kept_the_second_time() -> None:
    program = lfm2_program()
    cache = program.new_cache(64, slots=4, page_size=2)
    assert begun(program, cache, 0, IDS) == 0
    assert begun(program, cache, 1, [*IDS[:6], 30, 31, 32]) == 0  # none was kept behind 6 tokens: all is run again
    assert begun(program, cache, 2, [*IDS[:6], 33, 34, 35]) == 6
    assert begun(program, cache, 3, [*IDS[:6], 30, 31, 36]) == 8  # behind the second one's own prompt
    cache.free(3)
    assert begun(program, cache, 3, IDS) == 8  # the same prompt: all but what its last token needs


def test_states_that_are_kept_are_few() -> None:
    program, slots = lfm2_program(), 2
    cache = program.new_cache(64, slots=slots, page_size=2)
    empty, each = cache.bytes, sum(spec.bytes_per_slot() for spec in program.states)
    for turn in range(7):
        begun(program, cache, turn % 2, [turn, *IDS[1:7]])
        for _ in range(3):  # generated tokens move one along
            tree = TokenTree.chain([1, 2])
            program.verify(Forest([(turn % 2, tree)]), cache)
            cache.commit({turn % 2: [0, 1]})
        assert len(cache.checkpoints) == min(2 * turn + 2, cache.checkpoints.limit)
        assert cache.bytes - empty == each * len(cache.checkpoints)
        assert set(cache.checkpoints._kept) <= set(cache._pages._serial_of)  # each belongs to a page that is known
        cache.free(turn % 2)
    assert cache.page_counts.held == 0
    cache.forget()
    assert len(cache.checkpoints) == 0 and cache.bytes == empty


def test_a_state_goes_with_its_pages() -> None:
    """Too few pages for two texts: the first one's are taken, and nothing is found of it any more."""
    program = lfm2_program()
    cache = program.new_cache(12, slots=2, page_size=2, pages=6)
    begun(program, cache, 0, IDS)
    cache.free(0)
    other = [30, *IDS[1:]]
    assert begun(program, cache, 1, other) == 0
    assert len(cache.checkpoints) == 1 and cache.adopt(0, IDS) == 0
    cache.free(1)
    assert begun(program, cache, 1, other) == 8


@pytest.mark.parametrize("draft", ["ngram", "suffix", "self"])
def test_generated_ids_are_the_model_s(draft: str) -> None:
    model, prompt = lfm2(), [2, 3, 4, 2, 3, 4, 2, 3]
    wanted = prompt[:]
    for _ in range(14):
        wanted.append(int(eager_row(model, wanted).argmax()))
    drafts = model if draft == "self" else draft
    out = treespec.generate(model, prompt, draft=drafts, max_new_tokens=14, options=EAGER, eos_token_id=())
    assert out.sequences[0].tolist() == wanted


@pytest.mark.rare
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
        prompts += [prompts[4], prompts[5] + [7]]
        requests += [engine.add(p, max_new_tokens=5, eos_token_id=()) for p in prompts[6:]]
        engine.run()
    assert [r.stats.cached_tokens for r in requests[6:]] == [12, 12]  # of 14 and 15 tokens
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


@pytest.mark.rare
def test_a_mesh_is_refused() -> None:
    with pytest.raises(Unsupported, match="keeps a state") as caught:
        sharded.cut(sharded.uncut(lfm2()), 2)
    assert caught.value.kind is Refusal.MESH
