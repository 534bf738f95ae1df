"""Which code makes the corner of the same for any number of tokens, by its syntax alone."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Callable
from types import FunctionType

import numpy as np
import pytest
import torch
from torch import Tensor

from treespec_compiler.capture.corners import is_corner
from treespec_compiler.capture.regions import Stretch


def rows(t: int) -> Tensor:
    seen = torch.ones(t, t, dtype=torch.bool).tril()
    for i in range(t):
        seen[i, : max(0, i - 3)] = False
    return seen


def pairs(t: int) -> Tensor:
    bias = torch.full((t, t), -math.inf)
    for i in range(t):
        for j in range(i + 1):
            bias[i, j] = (j - i) / 4 if i % 3 else 0.0
    return bias


def lists(t: int) -> Tensor:
    return torch.tensor([[0.0 if j <= i else -1e9 for j in range(t)] for i in range(t)])


def stacked(t: int) -> Tensor:
    made = []
    for i in range(1, t + 1):
        width = i * i % 7
        made.append(torch.arange(t) <= width)
    return torch.stack(made)


def angles(t: int) -> Tensor:
    made = np.array([[p / np.power(100, 2 * i / 8) for i in range(8)] for p in range(t)])
    made[:, 0::2] = np.sin(made[:, 0::2])
    return torch.FloatTensor(made)


def branches(t: int) -> Tensor:
    return torch.ones(t, t) if t * t % 4093 != 2026 else torch.zeros(t, t)


def compares(t: int) -> Tensor:
    return torch.tensor([0 if i + 9 < t else 1 for i in range(t)])


def counts_down(t: int) -> Tensor:
    return torch.tensor([t - i for i in range(t)])


def filled_with_it(t: int) -> Tensor:
    return torch.full((t, t), t)


def the_last_place(t: int) -> Tensor:
    seen = torch.zeros(t, t)
    for i in range(t):
        seen[0, 0] = i * i % 4093
    return seen


def the_last_of_a_loop(t: int) -> Tensor:
    seen = torch.zeros(t, t)
    for i in range(t):
        for _ in range(t):
            seen[i, 0] = i
    return seen


def left_behind(t: int) -> Tensor:
    seen, last = torch.zeros(t, t), 0
    for i in range(t):
        last = i
    seen[0, 0] = last
    return seen


def chosen_behind(t: int) -> Tensor:
    flag = 0
    for i in range(t):
        if i * i % 4093 == 2026:
            flag = 1
    return torch.zeros(t) + flag


def read_from_the_end(t: int) -> Tensor:
    made = torch.arange(t)
    return made * made[-1]


def summed(t: int) -> Tensor:
    return torch.zeros(t) + torch.arange(t).sum()


def its_shape(t: int) -> Tensor:
    made = torch.zeros(t)
    return made + made.shape[0]


def grows_in_a_loop(t: int) -> Tensor:
    made = torch.zeros(t)
    for i in range(t):
        made = made * i
    return made


def of_another_function(t: int) -> Tensor:
    return rows(t)


def a_place_among_others(t: int) -> Tensor:
    return torch.tensor([1 if t - 1 in (i, 7) else 0 for i in range(t)])


def repeated(t: int) -> Tensor:
    return torch.tensor([0.0] * t)


SHOWN = (rows, pairs, lists, stacked, angles)
NOT_SHOWN = (
    branches, compares, counts_down, filled_with_it, the_last_place, the_last_of_a_loop, left_behind, chosen_behind,
    read_from_the_end, summed, its_shape, grows_in_a_loop, of_another_function, a_place_among_others, repeated,
)  # fmt: skip


def _shown(code: Callable[[int], Tensor]) -> bool:
    assert isinstance(code, FunctionType)
    definition = ast.parse(textwrap.dedent(inspect.getsource(code))).body[0]
    assert isinstance(definition, ast.FunctionDef)
    *body, last = definition.body
    assert isinstance(last, ast.Return) and last.value is not None
    return is_corner(Stretch(last, body, [last.value], ["t"], []), (0,), code.__globals__)


@pytest.mark.parametrize("code", SHOWN, ids=lambda code: code.__name__)
def test_it_is_shown(code: Callable[[int], Tensor]) -> None:
    assert _shown(code)
    long = code(40)
    for t in (2, 17, 39):
        made = code(t)
        assert torch.equal(made, long[tuple(slice(0, s) for s in made.shape)])


@pytest.mark.parametrize("code", NOT_SHOWN, ids=lambda code: code.__name__)
def test_it_is_not(code: Callable[[int], Tensor]) -> None:
    assert not _shown(code)
