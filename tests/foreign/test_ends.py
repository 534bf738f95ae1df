"""How models begin and end: each row of a tree is the model's own last row on that path, or the model is refused."""

from __future__ import annotations

import random

import pytest
import torch
from ends import CONVERTED, REFUSED, End
from modules import VOCAB
from oracles import EAGER, TOLERANCE, error, random_tree
from styles import built

import treespec_compiler as treespec


def assert_decodes(model: End, program: treespec.TreeProgram, rounds: int = 2, size: int = 9) -> None:
    """The path oracle, with the model called as it is written."""
    prefix = [(5 * i + 3) % VOCAB for i in range(7)]
    cache = program.new_cache(max_tokens=len(prefix) + (rounds + 1) * size)

    def row(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model.row(model(*model.arguments(torch.tensor([ids]))))

    assert error(program.prefill(prefix, cache), row(prefix)) <= TOLERANCE
    for seed in range(rounds):
        tree = random_tree(size, VOCAB, seed)
        rows = program.verify(tree, cache)
        assert rows.shape == (size, VOCAB)
        for node in range(size):
            assert error(rows[node], row([*prefix, *tree.path_tokens(node)])) <= TOLERANCE
        path = tree.path(random.Random(seed).randrange(size))
        cache.commit(path)
        prefix = prefix + [tree.tokens[i] for i in path]


@pytest.mark.family
@pytest.mark.parametrize("style", CONVERTED, ids=lambda style: style.__name__)
def test_rows_are_the_models_own(style: type[End]) -> None:
    model = built(style)
    program = treespec.tree_program(model, model.example, model.roles, EAGER)
    assert program.vocab_size == VOCAB
    assert_decodes(model, program)


@pytest.mark.family
@pytest.mark.parametrize("style", REFUSED, ids=lambda style: style.__name__)
def test_refused(style: type[End]) -> None:
    model = built(style)
    with pytest.raises(treespec.Unsupported):
        treespec.tree_program(model, model.example, model.roles, EAGER)
