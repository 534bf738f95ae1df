"""Bad input to a tree program: each error says what was got, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from modules import CONTEXT, VOCAB, Tiny
from oracles import EAGER

import treespec_compiler as treespec
from treespec_compiler import Forest, TokenTree
from treespec_compiler.errors import (
    CacheOverflow,
    ContextOverflow,
    InvalidOption,
    InvalidPath,
    InvalidPrompt,
    InvalidTree,
    StaleCache,
    TokenOutOfRange,
    TreespecError,
    UnknownOption,
    UnknownSlot,
)

ONE = TokenTree([1], [-1])
FORK = TokenTree([1, 2, 3], [-1, 0, 0])


@pytest.fixture(scope="module")
def program() -> Any:
    torch.manual_seed(0)
    return _keep(Tiny())


_KEPT: list[Any] = []


def _keep(model: torch.nn.Module) -> Any:
    _KEPT.append(model)
    return treespec.tree_program(model, options=EAGER)


CASES: dict[str, tuple[Callable[[Any, Any], Any], type[Exception], str]] = {
    "empty prompt": (lambda p, c: p.prefill([], c), InvalidPrompt, "got no ids, expected at least one"),
    "float prompt": (lambda p, c: p.prefill([1.5], c), InvalidPrompt, r"1\.5.*integer token ids"),
    "bool prompt": (lambda p, c: p.prefill([True], c), InvalidPrompt, "integer token ids"),
    "text prompt": (lambda p, c: p.prefill("hello", c), InvalidPrompt, "Encode the text"),
    "number as prompt": (lambda p, c: p.prefill(5, c), InvalidPrompt, "int"),
    "float tensor": (lambda p, c: p.prefill(torch.ones(3), c), InvalidPrompt, r"float32, expected torch\.int64"),
    "batch": (lambda p, c: p.prefill(torch.ones(2, 3).long(), c), InvalidPrompt, "a batch of 2 prompts.*own slot"),
    "large id": (lambda p, c: p.prefill([1, VOCAB], c), TokenOutOfRange, "got 23 at index 1 of the prompt, expected 0"),
    "negative id": (lambda p, c: p.prefill([-1], c), TokenOutOfRange, "got -1 at index 0"),
    "large id in a tree": (
        lambda p, c: p.verify(TokenTree([99], [-1]), c),
        TokenOutOfRange,
        "got 99 at index 0 of the tree of slot 0",
    ),
    "prompt too long": (lambda p, c: p.prefill([1] * 17, c), CacheOverflow, r"got 17 more.*16.*max_tokens=17"),
    "tree too large": (
        lambda p, c: p.verify(TokenTree.chain([1] * 17), c),
        CacheOverflow,
        "slot 0 holds 0 tokens and got 17 more",
    ),
    "slot": (lambda p, c: p.prefill([1], c, slot=2), UnknownSlot, r"got 2, expected an integer from 0 to 1"),
    "slot of a tree": (lambda p, c: p.verify(Forest([(7, ONE)]), c), UnknownSlot, "got 7"),
    "free": (lambda p, c: c.free(-1), UnknownSlot, "got -1"),
    "a list for a tree": (lambda p, c: p.verify([1, 2], c), InvalidTree, "got list, expected a TokenTree or a Forest"),
    "no cache": (lambda p, c: p.verify(ONE, None), InvalidOption, r"NoneType.*program\.new_cache"),
    "start too far": (lambda p, c: p.extend(FORK, c, start=2), InvalidTree, "start=2 for a tree of 3 nodes with 0"),
    "start past the end": (lambda p, c: (p.verify(FORK, c), p.extend(FORK, c, start=3)), InvalidTree, "start=3"),
    "negative start": (lambda p, c: (p.verify(FORK, c), p.extend(FORK, c, start=-1)), InvalidTree, "start=-1"),
    "another tree": (
        lambda p, c: (p.verify(FORK, c), p.extend(TokenTree([1, 9, 3], [-1, 0, 0]), c, start=2)),
        InvalidTree,
        "first 2 nodes differ",
    ),
    "path without a tree": (lambda p, c: c.commit([0]), InvalidPath, "no uncommitted tree"),
    "path not from a root": (lambda p, c: (p.verify(FORK, c), c.commit([1])), InvalidPath, "its parent, 0, before it"),
    "path of siblings": (lambda p, c: (p.verify(FORK, c), c.commit([0, 1, 2])), InvalidPath, "node 2 after 1"),
    "path past the end": (lambda p, c: (p.verify(FORK, c), c.commit([0, 5])), InvalidPath, "indices from 0 to 2"),
    "commit in no slot": (lambda p, c: c.commit({4: []}), UnknownSlot, "got 4"),
    "cache of no tokens": (
        lambda p, c: p.new_cache(0),
        InvalidOption,
        "max_tokens: got 0, expected a positive",
    ),
    "cache of half a slot": (lambda p, c: p.new_cache(8, slots=0.5), InvalidOption, "slots: got 0.5"),
}


@pytest.mark.parametrize("name", CASES)
def test_error(name: str, program: Any) -> None:
    action, kind, text = CASES[name]
    cache = program.new_cache(16, slots=2)
    with pytest.raises(kind, match=text) as caught:
        action(program, cache)
    assert isinstance(caught.value, TreespecError)
    assert cache.length(0) == 0 and cache.length(1) == 0  # nothing was half done


def test_a_path_is_checked_before_anything_moves(program: Any) -> None:
    cache = program.new_cache(16, slots=2)
    program.verify(Forest([(0, FORK), (1, FORK)]), cache)
    with pytest.raises(InvalidPath):
        cache.commit({0: [0, 1], 1: [1]})
    assert cache.length(0) == 0 and cache.uncommitted(0) == FORK
    cache.commit({0: [0, 1], 1: [0, 2]})
    assert cache.length(0) == cache.length(1) == 2


def test_the_position_table_ends(program: Any) -> None:
    """`new_cache` takes any size; the token that would pass the table is refused."""
    assert program.max_context == CONTEXT
    cache = program.new_cache(4 * CONTEXT)
    with pytest.raises(ContextOverflow, match=f"position {CONTEXT}, expected positions below {CONTEXT}"):
        program.prefill([1] * (CONTEXT + 1), cache)
    program.prefill([1] * (CONTEXT - 1), cache)
    program.verify(TokenTree([1, 2], [-1, -1]), cache)  # two nodes at the last position
    with pytest.raises(ContextOverflow, match="position table"):
        program.verify(TokenTree.chain([1, 2]), cache)


def test_a_cache_of_another_program(program: Any) -> None:
    with pytest.raises(StaleCache, match="new_cache"):
        program.prefill([1], _keep(Tiny()).new_cache(8))


def test_options() -> None:
    with pytest.raises(UnknownOption, match="Did you mean 'lowering'"):
        treespec.tree_program(Tiny(), options={"lowring": "eager"})
    with pytest.raises(InvalidOption, match=r"torch\.nn\.Module"):
        treespec.tree_program(lambda ids: ids)
    with pytest.raises(TreespecError, match="expected one of tokens, positions, constant"):
        treespec.tree_program(Tiny(), roles={"ids": "words"}, options=EAGER)
    with pytest.raises(TreespecError, match=r"shape \[2, 4\], expected \[1, T\]"):
        treespec.tree_program(Tiny(), example=torch.ones(2, 4).long(), options=EAGER)
