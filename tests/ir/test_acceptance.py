"""The rules say the same of numpy's rows and of torch's, and take a number for every question."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from treespec_compiler.ir.acceptance import follow, in_order, naive, rejection, traversal
from treespec_compiler.speculation.sampling.chance import SeededChance

#     0
#   1   2
#  3 4   5
TOKENS, PARENTS = [9, 1, 2, 0, 3, 1], [-1, 0, 0, 1, 1, 2]
CHILDREN = {0: [1, 2], 1: [3, 4], 2: [5]}
V = 5


class TorchChance:
    def __init__(self, seed: int) -> None:
        self._chance = SeededChance(seed)

    def accept(self, probability: float) -> bool:
        return self._chance.accept(probability)

    def choose(self, weights: torch.Tensor) -> int:
        return self._chance.choose(weights.numpy())


def rows(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet([0.4] * V, len(TOKENS))


def outcome(rule: str, p, q, chance, one_hot: bool):
    def drawn(node):
        below = CHILDREN.get(node, [])
        return in_order(below, TOKENS, None if one_hot else q[node], rule == "multi-step")

    if rule == "naive":
        return naive(TOKENS, PARENTS, p.__getitem__, chance)
    return (traversal if rule == "traversal" else rejection)(TOKENS, p.__getitem__, drawn, chance)


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("rule", ["naive", "multi-step", "recursive", "traversal"])
def test_rows_of_numpy_and_of_torch_give_the_same(rule, one_hot):
    depths = set()
    for seed in range(200):
        p, q = rows(seed), rows(1000 + seed)
        kept = p.copy(), q.copy()
        a, b = SeededChance(seed), TorchChance(seed)
        got = outcome(rule, p, q, a, one_hot)
        assert got == outcome(rule, torch.from_numpy(p), torch.from_numpy(q), b, one_hot)
        assert a.accept(0.5) == b.accept(0.5)  # as many numbers were taken
        path = got[0]
        assert path[0] == 0 and [PARENTS[node] for node in path[1:]] == path[:-1]
        assert np.array_equal(p, kept[0]) and np.array_equal(q, kept[1])  # rows are not written to
        depths.add(len(path))
    assert depths == {1, 2, 3}


def test_without_replacement_a_drawn_token_leaves_q_and_with_it_stays():
    q = np.array([0.5, 0.25, 0.25])
    again = [row.tolist() for _, row in in_order([0, 1, 2], [0, 1, 2], q, False)]
    assert again == [[0.5, 0.25, 0.25], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]
    assert all(row is q for _, row in in_order([0, 1], [0, 0], q, True))
    assert [row for _, row in in_order([0, 1], [0, 1], None, False)] == [None, None]


def test_several_roots_are_followed_from_the_wanted_token():
    want = [7, 8, 5]
    assert follow([3, 4, 7], [-1, -1, 1], [], 4, lambda node: [0, 7, 5][node]) == ([1, 2], 5)
    assert follow([3, 4, 7], [-1, -1, 1], [], 6, want.__getitem__) == ([], 6)
