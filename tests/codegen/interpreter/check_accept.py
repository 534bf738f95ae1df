"""Greedy acceptance in kernels against its definition."""

from __future__ import annotations

import pytest
import torch
from bfloat16 import exact_bfloat16

from treespec_compiler.codegen.gpu.accept import BLOCK, GREEDY_ACCEPT
from treespec_compiler.ir.ops import greedy_accept

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def forest(sizes, generator, width=3):
    """Parents of random trees, as in one call of several requests, and where each begins."""
    parents = []
    for size in sizes:
        parents += [-1, *(int(torch.randint(max(0, i - width), i, (), generator=generator)) for i in range(1, size))]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return torch.tensor(parents, dtype=torch.int64), offsets


def likely_tokens(logits, parents, offsets, generator):
    """Tokens such that about two of three nodes are what their parent's row would choose."""
    choices = logits.argmax(-1)
    tokens = torch.randint(0, logits.shape[1], (len(parents),), generator=generator)
    for first, end in zip(offsets.tolist(), offsets.tolist()[1:]):
        for node in range(first + 1, end):
            if torch.rand((), generator=generator) < 0.67:
                tokens[node] = choices[first + parents[node]]
    return tokens


def check(logits, parents, offsets, tokens, tie=2.0**-7):
    want = greedy_accept(logits, tokens, parents, offsets, tie)
    got = GREEDY_ACCEPT(logits, tokens, parents, offsets, tie)
    assert got.tolist() == want.tolist()
    return got


@pytest.mark.family
@exact_bfloat16()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 2, 7, BLOCK, BLOCK + 1, 5000])
def test_random_forests_full_of_ties(dtype, vocab_size):
    """Logits are small integers, so that most rows have several largest ones."""
    generator = torch.Generator().manual_seed(vocab_size)
    for sizes in ([1], [6], [3, 1, 5]):
        parents, offsets = forest(sizes, generator)
        logits = torch.randint(-3, 4, (len(parents), vocab_size), generator=generator).to(dtype)
        tokens = likely_tokens(logits, parents, offsets, generator)
        check(logits, parents, offsets, tokens)


def test_near_ties_are_of_the_path_only_and_relative():
    parents, offsets = torch.tensor([-1, 0, 0]), torch.tensor([0, 3])
    logits = torch.tensor([[0.0, 9.0, 1.0], [4.0, 0.0, 4.03], [5.0, 5.0, 0.0]])
    tokens = torch.tensor([7, 1, 0])  # node 1 is accepted, node 2, with its tie, is not
    assert check(logits, parents, offsets, tokens, tie=2.0**-7).tolist()[:4] == [2, 2, -1, 1]
    assert check(logits, parents, offsets, tokens, tie=2.0**-8).tolist()[:4] == [2, 2, -1, 0]
    assert check(logits, parents, offsets, tokens, tie=0.0).tolist()[:4] == [2, 2, -1, 0]
    alone = torch.full((3, 3), -torch.inf)
    alone[:, 1] = 2.0
    assert check(alone, parents, offsets, tokens, tie=2.0**-7)[3] == 0  # nothing is near the only finite one


@pytest.mark.family
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["one", "row"])
def test_unusable_rows(value, where):
    parents, offsets = torch.tensor([-1, 0, 1, 0, 3]), torch.tensor([0, 5])
    for row in range(5):
        logits = torch.randn(5, 40)
        tokens = torch.randint(0, 40, (5,))
        tokens[1] = logits[0].argmax()
        tokens[2] = logits[1].argmax()
        if where == "row":
            logits[row] = value
        else:
            logits[row, 17] = value
            logits[row, 30] = torch.inf
        got = check(logits, parents, offsets, tokens)
        expected = row if row <= 2 else -1
        if row == 0:  # what follows an unusable row means nothing, but it is the same
            expected = 0
        assert got[2] == expected


def test_zeros_of_both_signs_are_equal():
    logits = torch.tensor([[-0.0, 0.0, -1.0], [0.0, -0.0, -1.0]])
    check(logits, torch.tensor([-1, 0]), torch.tensor([0, 2]), torch.tensor([5, 0]))


def test_subnormal_and_extreme_logits():
    largest, tiny = torch.finfo(torch.float32).max, 1e-42
    logits = torch.tensor([[tiny, 2 * tiny, -tiny], [-largest, largest, largest], [-largest, -largest, -largest]])
    check(logits, torch.tensor([-1, 0, 1]), torch.tensor([0, 3]), torch.tensor([5, 1, 1]))


@exact_bfloat16()
@pytest.mark.parametrize("scale", [1.0, 1e-39, 1e38])
def test_rows_of_bfloat16(scale):
    """Numbers with few bits, subnormal and near the largest: each row's choice and its near ties."""
    generator = torch.Generator().manual_seed(0)
    parents, offsets = forest([4, 3], generator)
    logits = (torch.randn(7, BLOCK + 100, generator=generator) * scale).bfloat16()
    logits[:, ::3] = logits[:, 1::3]  # ties
    for tie in (0.0, 2.0**-7):
        check(logits, parents, offsets, likely_tokens(logits, parents, offsets, generator), tie)


def test_equal_siblings_the_first_is_taken():
    logits = torch.zeros(4, 5)
    got = check(logits, torch.tensor([-1, 0, 0, 0]), torch.tensor([0, 4]), torch.tensor([3, 1, 0, 0]))
    assert got.tolist() == [2, 0, -1, 1, 0, 2, -1, -1]


def test_strided_logits_and_a_long_chain():
    nodes, vocab_size = 70, 64
    logits = torch.randn(vocab_size, 2 * nodes).t()[::2]
    parents = torch.arange(-1, nodes - 1)
    tokens = torch.cat([torch.zeros(1, dtype=torch.int64), logits.argmax(-1)[:-1]])
    got = check(logits, parents, torch.tensor([0, nodes]), tokens)
    assert got[0] == nodes


def test_requests_without_nodes():
    logits = torch.randn(2, 30)
    got = check(logits, torch.tensor([-1, 0]), torch.tensor([0, 0, 2, 2]), logits.argmax(-1))
    assert got[:4].tolist() == [0, -1, -1, 0] and got[8:12].tolist() == [0, -1, -1, 0]


def test_metadata_of_any_strides():
    logits = torch.randn(3, 30)
    columns = torch.tensor([[5, -1], [7, 0], [int(logits[0].argmax()), 0]])  # tokens and parents side by side
    offsets = torch.tensor([0, 9, 3, 9])[::2]
    assert check(logits, columns[:, 1], offsets, columns[:, 0])[:1].tolist() == [2]
