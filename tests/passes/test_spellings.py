"""Spellings that normalize rewrites: inverse permutations, tensors written part by part; and what is known of ids."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from modules import DIM, VOCAB, Tiny
from oracles import EAGER, assert_decodes
from pass_cases import applied
from torch import Tensor
from torch.nn import functional as F

import treespec_compiler as treespec
from treespec_compiler.ir.provenance import op_name
from treespec_compiler.passes import normalize
from treespec_compiler.passes.locality.ids import id_bound, same_ids

Function = Callable[[Tensor], Tensor]


def model(function: Function) -> Tiny:
    """`function` [T, C] -> [T, C] before the head."""

    class Finished(Tiny):
        layers = 1

        def finish(self, x: Tensor) -> Tensor:
            return self.head(function(x[0])[None])

    return Finished()


def written(x: Tensor, numbers: Tensor, accumulate: bool = False) -> Tensor:
    order = x[:, 0].sort()[1]
    out = torch.zeros_like(order)
    out.index_put_((order,), numbers, accumulate)
    return x + x[order][out]


def count(x: Tensor) -> int:
    return x.shape[0]


INVERSES: list[tuple[Function, bool]] = [
    (lambda x: written(x, torch.arange(count(x))), True),
    (lambda x: written(x, torch.arange(count(x)), accumulate=True), False),
    (lambda x: written(x, torch.arange(1, count(x) + 1)), False),
    (lambda x: written(x, torch.arange(0, 2 * count(x), 2)), False),
    (lambda x: written(x, torch.zeros(count(x), dtype=torch.int64)), False),
]


@pytest.mark.parametrize(("function", "fires"), INVERSES, ids=["arange", "added", "from 1", "by 2", "zeros"])
def test_the_inverse_of_a_permutation(function: Function, fires: bool) -> None:
    old, new, _, _ = applied(model(function), normalize.PASS)
    assert "aten.index_put" in old and "aten.argsort" not in old
    assert ("aten.argsort" in new, "aten.index_put" in new) == (fires, not fires)


def test_numbers_written_at_choices_are_no_inverse() -> None:
    def function(x: Tensor) -> Tensor:
        choice = x[:, :2].argmax(-1)
        out = torch.zeros_like(choice)
        out[choice] = torch.arange(count(x))
        return x * out[:, None]

    _, new, _, _ = applied(model(function), normalize.PASS)
    assert "aten.argsort" not in new
    with pytest.raises(treespec.Unsupported):
        treespec.tree_program(model(function), options=EAGER)


def assembled(*ends: tuple[int, int]) -> Function:
    """Slices of a new tensor, written one after the other."""

    def function(x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape)
        for i, (start, end) in enumerate(ends):
            out[:, start:end] = x[:, start:end] * (i + 2)
        return out

    return function


ASSEMBLED = [
    (((0, 6), (6, DIM)), True),
    (((6, DIM), (0, 6)), True),
    (((0, 4), (4, 8), (8, DIM)), True),
    (((0, 6), (7, DIM)), False),
    (((0, 8), (6, DIM)), False),
    (((0, 6),), False),
]


@pytest.mark.family
@pytest.mark.parametrize(("ends", "fires"), ASSEMBLED)
def test_tensors_that_are_written_part_by_part(ends: tuple[tuple[int, int], ...], fires: bool) -> None:
    decoder = model(assembled(*ends))
    old, new, _, _ = applied(decoder, normalize.PASS)
    assert "aten.slice_scatter" in old and "aten.cat" not in old
    assert ("aten.cat" in new, "aten.slice_scatter" in new) == (fires, not fires)
    assert_decodes(decoder, treespec.tree_program(decoder, options=EAGER), 23, rounds=1)


IDS: list[tuple[str, Function, int | None]] = [
    ("topk", lambda x: x.topk(2, -1)[1], DIM),
    ("argmax", lambda x: x[:, :5].argmax(-1), 5),
    ("max", lambda x: x.max(-1)[1], DIM),
    ("cast", lambda x: x.topk(2, -1)[1].float().reshape(-1), DIM),
    ("narrow", lambda x: x.topk(2, -1)[1].to(torch.bool).long(), None),
    ("sort", lambda x: x.topk(2, -1)[1].reshape(-1).sort()[0], DIM),
    ("tokens", lambda x: x.argmax(0), None),
    ("doubled", lambda x: x.topk(2, -1)[1] * 2, None),
    ("values", lambda x: x.topk(2, -1)[0], None),
]


@pytest.mark.family
@pytest.mark.parametrize(("function", "bound"), [i[1:] for i in IDS], ids=[i[0] for i in IDS])
def test_the_bound_of_ids(function: Function, bound: int | None) -> None:
    _, _, _, state = applied(model(lambda x: x + function(x).sum()), normalize.PASS)
    total = next(n for n in state.graph.nodes if op_name(n) == "aten.sum")
    ids = total.args[0]
    assert id_bound(ids) == bound
    if bound is not None:
        assert same_ids(ids).op == "call_function"


def test_synonyms() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.concat((x.multiply(x), x.subtract(1).clip(0, 1)), -1)[:, :DIM].where(x.greater(0), x.negative())

    _, new, _, _ = applied(model(function), normalize.PASS)
    wordy = {"aten.concat", "aten.multiply", "aten.subtract", "aten.clip", "aten.greater", "aten.negative"}
    assert not wordy & set(new) and {"aten.cat", "aten.mul", "aten.sub", "aten.clamp", "aten.gt", "aten.neg"} <= set(
        new
    )


def test_ops_by_other_names() -> None:
    def function(x: Tensor) -> Tensor:
        left, right = x[:, :8], x[:, 8:]
        y = torch.hstack([left, right.relu()]) + torch.column_stack([right, left]) + left.tile(2) + x.fliplr()
        y = y + torch.dstack([left[None], F.rrelu(right)[None]])[0] + torch.vstack([x])
        return y / (1 + torch.linalg.norm(x, dim=-1, keepdim=True)) + F.pairwise_distance(x, y)[:, None]

    treed = model(function)
    _, new, _, _ = applied(treed, normalize.PASS)
    assert not {"aten.hstack", "aten.dstack", "aten.tile", "aten.fliplr", "aten.rrelu", "aten.pairwise_distance"} & set(
        new
    )
    assert_decodes(treed, treespec.tree_program(treed, options=EAGER), VOCAB, rounds=1, size=6)


@pytest.mark.family
@pytest.mark.parametrize(
    "mixed", [lambda x: x.flipud(), lambda x: torch.vstack([x[1:], x[:1]]), lambda x: x[:1].tile(x.shape[0], 1)]
)
def test_tokens_by_other_names_are_mixed(mixed: Function) -> None:
    with pytest.raises(treespec.Unsupported):
        treespec.tree_program(model(mixed), options=EAGER)
