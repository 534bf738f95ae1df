"""Hybrids with a recurrence: every row is the eager model's, with prompts around the borders of its blocks."""

from __future__ import annotations

from functools import cache as remember
from typing import Any

import pytest
import zoo
from oracles import EAGER, TOLERANCE, assert_decodes, assert_rows, eager_row, error, random_tree
from torch import nn

import treespec_compiler as treespec
from treespec_compiler import Forest, TokenTree

pytest.importorskip("transformers")
NAMES = {
    "qwen3_next": {},
    "mamba2": {"chunk_size": 16},
    "mamba": {},
    "kimi_linear": {},
    "minimax": {"block_size": 16},
    "recurrent_gemma": {},
    "rwkv": {},
    "xlstm": {"chunk_size": 16},
}
NO_ATTENTION = ("mamba", "mamba2", "recurrent_gemma", "rwkv", "xlstm")
VOCAB = 40


@remember
def model_of(name: str) -> nn.Module:
    return zoo.tiny_model(name, **NAMES[name])


@remember
def program_of(name: str) -> Any:
    return treespec.tree_program(model_of(name), options=EAGER)


@pytest.mark.family
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.rare
def test_a_convolution_and_a_recurrence_each(name: str) -> None:
    kinds = [s.kind for s in program_of(name).states]
    wanted = {"recurrence"} if name == "minimax" else {"convolution", "recurrence"}
    wanted = {"rwkv": {"convolution", "exponential recurrence"}, "xlstm": {"exponential recurrence"}}.get(name, wanted)
    assert set(kinds) == wanted and (name == "rwkv" or kinds[-1] != "convolution")
    assert (len(program_of(name).sites) == 0) is (name in NO_ATTENTION)


@pytest.mark.family
@pytest.mark.parametrize(
    ("name", "prompt", "size"),
    [
        *(("qwen3_next", prompt, size) for prompt, size in ((1, 11), (63, 11), (64, 80), (65, 11), (130, 11))),
        *(("mamba2", prompt, size) for prompt, size in ((1, 11), (15, 11), (16, 80), (17, 11))),
        *(("xlstm", prompt, size) for prompt, size in ((1, 11), (15, 11), (16, 80), (17, 11), (33, 11))),
        *(("minimax", prompt, size) for prompt, size in ((1, 11), (15, 11), (16, 80), (17, 11), (33, 11))),
        *(
            (name, prompt, size)
            for name in ("mamba", "kimi_linear", "recurrent_gemma", "rwkv")
            for prompt, size in ((1, 11), (64, 80), (65, 11))
        ),
    ],
)
@pytest.mark.rare
def test_three_rounds(name: str, prompt: int, size: int) -> None:
    assert_decodes(model_of(name), program_of(name), VOCAB, size=size, prompt=prompt)


@pytest.mark.family
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.rare
def test_prompts_in_pieces_and_trees_by_level(name: str) -> None:
    model = model_of(name)
    program = treespec.tree_program(model, options={**EAGER, "prefill_chunk": 7})
    cache, tree = program.new_cache(96, slots=2), random_tree(9, VOCAB, 4)
    prefix = [5 * i % VOCAB for i in range(18)]
    program.prefill(prefix, cache, 1)
    for start, end in ((0, 2), (2, 6), (6, 9)):
        part = TokenTree(tree.tokens[:end], tree.parents[:end])
        rows = program.extend(Forest([(1, part)]), cache, start={1: start})
        assert_rows(model, rows, part, prefix, range(start, end))
    cache.commit({1: tree.path(8)})
    prefix += [tree.tokens[n] for n in tree.path(8)]
    rows = program.verify(Forest([(0, tree), (1, tree)]), cache)
    assert_rows(model, rows[:9], tree, [])
    assert_rows(model, rows[9:], tree, prefix)


@pytest.mark.family
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.rare
def test_an_engine_gives_the_model_s_ids(name: str) -> None:
    prompts = [[2, 3, 4, 2, 3], [7], [5] * 20]
    outs = treespec.generate(model_of(name), prompts, draft="ngram", max_new_tokens=10, options=EAGER, eos_token_id=())
    for out, prompt in zip(outs, prompts, strict=True):
        wanted = prompt[:]
        for _ in range(10):
            wanted.append(int(eager_row(model_of(name), wanted).argmax()))
        assert out.sequences[0].tolist() == wanted


@pytest.mark.family
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.rare
def test_beginnings_are_shared_and_a_freed_slot_begins_anew(name: str) -> None:
    model, program = model_of(name), program_of(name)
    cache = program.new_cache(64, slots=2, page_size=4)

    def begun(slot: int, ids: list[int]) -> int:
        """How many tokens others had; the row behind all of them is the model's."""
        found = cache.adopt(slot, ids)
        assert error(program.prefill(ids[found:], cache, slot), eager_row(model, ids)) <= TOLERANCE
        return found

    ids, tree = [5 * i % VOCAB for i in range(1, 11)], random_tree(8, VOCAB, 1)
    assert begun(0, ids) == 0 and begun(1, ids) == 8
    program.verify(Forest([(1, tree), (0, tree)]), cache)
    cache.commit({1: tree.path(5), 0: tree.path(7)})
    cache.free(0)
    assert begun(0, [3, *ids[1:]]) == 0
    path = ids + [tree.tokens[n] for n in tree.path(5)]
    assert_rows(model, program.verify(Forest([(1, tree)]), cache), tree, path)


@pytest.mark.family
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.rare
def test_a_cancelled_request_leaves_the_others_as_they_are(name: str) -> None:
    prompts = [[2, 3, 4, 2, 3], [7, 7, 7], [5] * 9, [9, 1]]
    with treespec.Engine(program_of(name), draft="ngram", max_requests=3, page_size=4, options=EAGER) as engine:
        requests = [engine.add(prompt, max_new_tokens=8, eos_token_id=()) for prompt in prompts]
        engine.step()
        requests[1].cancel()
        engine.run()
    for request, prompt in zip(requests, prompts, strict=True):
        wanted = prompt[:]
        for token in request.output.tokens:
            wanted.append(int(eager_row(model_of(name), wanted).argmax()))
            assert token == wanted[-1]
    assert [len(request.output.tokens) for request in (requests[0], *requests[2:])] == [8, 8, 8]


@pytest.mark.rare
def test_compiled_once_for_all_sizes() -> None:
    model = model_of("qwen3_next")
    program = treespec.tree_program(model)
    assert_decodes(model, program, VOCAB, rounds=2)
    assert_decodes(model, program, VOCAB, rounds=1, size=70, prompt=66)
    assert program.compile_count == 1
