"""Mixture-of-experts routing: what is proved token by token, and what must be refused."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from modules import DIM, Tiny
from oracles import EAGER, Forest, assert_decodes, assert_rows, random_tree
from torch import Tensor, nn

import treespec_compiler as treespec
from treespec_compiler.passes.locality.axes import Mixes
from treespec_compiler.passes.locality.rows import Repeats, Rows, reshaped

pytest.importorskip("transformers.integrations.moe")  # defines transformers::grouped_mm_fallback

EXPERTS, CHOICES, VOCAB = 4, 2, 23


class Routed(Tiny):
    """Two experts of four for each token; the pieces of the routing are methods."""

    choices = CHOICES

    def setup(self) -> None:
        self.router = nn.Linear(DIM, EXPERTS)
        self.other_router = nn.Linear(DIM, EXPERTS)
        self.experts = nn.Parameter(torch.randn(EXPERTS, DIM, DIM) * 0.3)

    def block(self, x: Tensor, layer: int) -> Tensor:
        x = super().block(x, layer)
        return x + self.mixture(x[0])[None]

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(self.choices, -1)
        return weights, ids  # [T, k]

    def ends(self, ids: Tensor) -> Tensor:
        return torch.histc(ids.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)

    def order(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sort(ids)

    def combine(self, rows: Tensor, order: Tensor, x: Tensor) -> Tensor:
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0])
        return rows[inverse].view(x.shape[0], self.choices, DIM).sum(1)

    def scale(self, rows: Tensor, ends: Tensor) -> Tensor:
        return rows

    def mixture(self, x: Tensor) -> Tensor:
        weights, choices = self.route(x)
        ids = choices.reshape(-1)  # [T * k]
        in_order, order = self.order(ids)
        ends = self.ends(in_order)
        rows = grouped(x[order // self.choices], self.experts, ends)
        rows = self.scale(rows.tanh(), ends) * weights.reshape(-1)[order][:, None]
        return self.combine(rows, order, x)


def grouped(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return torch.ops.transformers.grouped_mm_fallback(rows, matrices, ends)


class AddedUp(Routed):
    """Combined by adding rows up at their tokens."""

    def combine(self, rows: Tensor, order: Tensor, x: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, order // self.choices, rows)


class WrittenBack(Routed):
    """Combined by writing rows to where they came from."""

    def combine(self, rows: Tensor, order: Tensor, x: Tensor) -> Tensor:
        back = torch.zeros(order.shape[0], DIM)
        back[order] = rows
        return back.view(x.shape[0], self.choices, DIM).sum(1)


class SortedTwice(Routed):
    def combine(self, rows: Tensor, order: Tensor, x: Tensor) -> Tensor:
        return rows[order.argsort()].view(x.shape[0], self.choices, DIM).sum(1)


class TopOne(Routed):
    """T * 1 rows: the numbers that are written at the permutation must not be taken for positions."""

    choices = 1


class Batched(Routed):
    """Each row with a matrix of its own, looked up by its id."""

    def mixture(self, x: Tensor) -> Tensor:
        weights, choices = self.route(x)
        rows = torch.bmm(x.repeat_interleave(CHOICES, 0)[:, None], self.experts[choices.reshape(-1)])[:, 0]
        return (rows.tanh() * weights.reshape(-1, 1)).view(-1, CHOICES, DIM).sum(1)


class ChoiceMajor(Routed):
    """Rows of first choices, then rows of second choices."""

    def mixture(self, x: Tensor) -> Tensor:
        weights, choices = self.route(x)
        rows = torch.bmm(x.repeat(CHOICES, 1)[:, None], self.experts[choices.t().reshape(-1)])[:, 0]
        return (rows.tanh() * weights.t().reshape(-1, 1)).view(CHOICES, -1, DIM).sum(0)


class Everywhere(Routed):
    """Every token to every expert, most with weight zero (Llama 4)."""

    def mixture(self, x: Tensor) -> Tensor:
        weights, choices = self.route(x)
        dense = torch.zeros(x.shape[0], EXPERTS).scatter(1, choices, weights)  # [T, E]
        rows = torch.bmm(x.repeat(EXPERTS, 1).view(EXPERTS, -1, DIM), self.experts).tanh()  # [E, T, C]
        return (rows * dense.t().reshape(EXPERTS, -1, 1)).sum(0)


CONVERTS = (Routed, AddedUp, WrittenBack, SortedTwice, TopOne, Batched, ChoiceMajor, Everywhere)


@pytest.mark.family
@pytest.mark.parametrize("kind", CONVERTS)
def test_routing_converts_and_decodes(kind: type[Routed]) -> None:
    model = kind()
    program = treespec.tree_program(model, options=EAGER)
    assert_decodes(model, program, VOCAB)


@pytest.mark.parametrize("kind", [Routed, TopOne, Batched])
def test_requests_packed_in_one_forest_do_not_meet(kind: type[Routed]) -> None:
    model = kind()
    program = treespec.tree_program(model, options=EAGER)
    cache = program.new_cache(max_tokens=32, slots=2)
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    for slot, prompt in enumerate(prompts):
        program.prefill(prompt, cache, slot)
    trees = [random_tree(9, VOCAB, 1), random_tree(6, VOCAB, 2)]
    rows = program.verify(Forest(list(enumerate(trees))), cache)
    assert_rows(model, rows[:9], trees[0], prompts[0])
    assert_rows(model, rows[9:], trees[1], prompts[1])


class Capacity(Routed):
    """An expert takes the first three rows that ask for it: what a token gets depends on those before it."""

    def mixture(self, x: Tensor) -> Tensor:
        weights, choices = self.route(x)
        asked = (choices[..., None] == torch.arange(EXPERTS)).float().sum(1)  # [T, E]
        kept = asked.cumsum(0) <= 3
        dense = torch.zeros(x.shape[0], EXPERTS).scatter(1, choices, weights) * kept
        return torch.einsum("td,edc,te->tc", x, self.experts, dense)


class CapacityOfSorted(Routed):
    """The same, from places in the sorted order and where groups end."""

    def scale(self, rows: Tensor, ends: Tensor) -> Tensor:
        return rows * (torch.arange(rows.shape[0])[:, None] < ends[0])


class Balanced(Routed):
    """Rows divided by how many their expert got."""

    def scale(self, rows: Tensor, ends: Tensor) -> Tensor:
        return rows / ends[-1]


class NotInverse(Routed):
    """The permutation once more instead of its inverse: right for a sorted batch, wrong for others."""

    def combine(self, rows: Tensor, order: Tensor, x: Tensor) -> Tensor:
        return rows[order].view(x.shape[0], self.choices, DIM).sum(1)


class Reversed(Routed):
    """The places of the permutation from the last to the first."""

    def combine(self, rows: Tensor, order: Tensor, x: Tensor) -> Tensor:
        return rows[order.argsort(descending=True)].view(x.shape[0], self.choices, DIM).sum(1)


class NotUndone(Routed):
    def combine(self, rows: Tensor, order: Tensor, x: Tensor) -> Tensor:
        return rows.view(x.shape[0], self.choices, DIM).sum(1)


class OtherInverse(Routed):
    """The inverse of another sort of the same ids: equal ids may come in another order."""

    def mixture(self, x: Tensor) -> Tensor:
        weights, choices = self.route(x)
        ids = choices.reshape(-1)
        in_order, order = torch.sort(ids)
        rows = grouped(x[order // CHOICES], self.experts, self.ends(in_order))
        return self.combine(rows * weights.reshape(-1)[order][:, None], torch.sort(ids, stable=True)[1], x)


class OtherEnds(Routed):
    """Groups end where another router's counts say."""

    def mixture(self, x: Tensor) -> Tensor:
        weights, choices = self.route(x)
        _, order = torch.sort(choices.reshape(-1))
        others = self.other_router(x).topk(self.choices, -1)[1]
        rows = grouped(x[order // CHOICES], self.experts, self.ends(others.reshape(-1)))
        return self.combine(rows * weights.reshape(-1)[order][:, None], order, x)


class Descending(Routed):
    def order(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sort(ids, descending=True)


class TwoInOneBin(Routed):
    """Bins of a histogram that do not hold one id each."""

    def ends(self, ids: Tensor) -> Tensor:
        return torch.histc(ids.float(), EXPERTS, 0, 2 * EXPERTS).cumsum(0, dtype=torch.int32)


class UnboundedIds(Routed):
    """Ids that may be larger than the number of experts: their rows would be left out."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        return weights, ids * 2


class NotSorted(Routed):
    def mixture(self, x: Tensor) -> Tensor:
        weights, choices = self.route(x)
        rows = grouped(x.repeat_interleave(CHOICES, 0), self.experts, self.ends(choices.reshape(-1)))
        return (rows * weights.reshape(-1, 1)).view(-1, CHOICES, DIM).sum(1)


class WrongTokens(AddedUp):
    """Rows added up at `order % k`, which are places of other tokens."""

    def combine(self, rows: Tensor, order: Tensor, x: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, order % self.choices, rows)


class MixedOrders(Routed):
    """Sorted rows weighted in the order before the sort."""

    def mixture(self, x: Tensor) -> Tensor:
        weights, choices = self.route(x)
        in_order, order = torch.sort(choices.reshape(-1))
        rows = grouped(x[order // CHOICES], self.experts, self.ends(in_order)) * weights.reshape(-1, 1)
        return self.combine(rows, order, x)


class ExpertChoice(Routed):
    """Each expert picks its two best tokens."""

    def mixture(self, x: Tensor) -> Tensor:
        weights, picked = self.router(x).topk(2, 0)  # [2, E]
        return x + weights.sum() + picked.sum()


REFUSES = [
    (Capacity, "aten.cumsum mixes tokens: it works along dimension 0"),
    (CapacityOfSorted, "must be one whole dimension"),
    (Balanced, "depends on every token"),
    (NotInverse, "count other rows"),
    (Reversed, "already in the order of sort"),
    (NotUndone, "splits rows that are in the order of sort"),
    (OtherInverse, "it undoes the order of"),
    (OtherEnds, "but its rows are sorted by"),
    (Descending, "but its rows are sorted by"),
    (TwoInOneBin, "no bin of its own"),
    (UnboundedIds, "it counts a value over all tokens"),
    (NotSorted, "its rows are not sorted"),
    (WrongTokens, "not known to belong to the same token"),
    (MixedOrders, "different orders"),
    (ExpertChoice, "it works along dimension 0"),
]


@pytest.mark.family
@pytest.mark.parametrize(("kind", "reason"), REFUSES, ids=lambda value: getattr(value, "__name__", ""))
def test_routing_that_mixes_tokens_is_refused(kind: type[Routed], reason: str) -> None:
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(kind(), options=EAGER)
    assert reason in refusal.value.reason
    assert "test_routing.py" in str(refusal.value.source)


def test_a_grouped_matmul_with_too_few_matrices_is_refused() -> None:
    model = Routed()
    model.router = nn.Linear(DIM, EXPERTS + 1)
    with pytest.raises(treespec.Unsupported, match="it counts a value over all tokens"):
        treespec.tree_program(model, options=EAGER)


T = sympy.Symbol("T", integer=True, positive=True)


def shape(*sizes: Any) -> tuple[sympy.Expr, ...]:
    return tuple(map(sympy.sympify, sizes))


@pytest.mark.parametrize(
    ("rows", "before", "after", "expected"),
    [
        (Rows(0), shape(T, 2), shape(2 * T), Rows(0, Repeats(1, 2))),
        (Rows(0, Repeats(1, 2)), shape(2 * T), shape(T, 2), Rows(0)),
        (Rows(1), shape(3, T), shape(3 * T), Rows(0, Repeats(3, 1))),
        (Rows(0, Repeats(3, 1)), shape(3 * T, 5), shape(3, T, 5), Rows(1)),
        (Rows(1), shape(1, T, 4, 2), shape(T * 4, 2), Rows(0, Repeats(1, 4))),
        (Rows(1, Repeats(1, 4)), shape(1, 4 * T), shape(1, 2 * T, 2), Rows(1, Repeats(1, 2))),
    ],
)
def test_rows_through_reshapes(rows: Rows, before: Any, after: Any, expected: Rows) -> None:
    assert reshaped(rows, before, after, T) == expected
    # by brute force: the token of every element
    sizes = {T: 7}
    old, new = ([int(s.subs(sizes)) for s in shape_] for shape_ in (before, after))
    assert torch.equal(tokens(rows, old).reshape(new), tokens(expected, new))


def tokens(rows: Rows, sizes: list[int]) -> Tensor:
    """The token that each element of a tensor belongs to."""
    along = torch.arange(sizes[rows.at]) // rows.repeats.inner % 7
    return along.view([-1 if i == rows.at else 1 for i in range(len(sizes))]).expand(sizes)


def test_a_reshape_that_cuts_tokens_is_refused() -> None:
    with pytest.raises(Mixes, match="cuts the tokens apart"):
        reshaped(Rows(0), shape(T, 4), shape(2, T, 2), T)
    sort: Any = type("Sort", (), {"name": "sort_1"})()
    with pytest.raises(Mixes, match="in the order of sort_1"):
        reshaped(Rows(0, Repeats(1, 2), sort), shape(2 * T), shape(T, 2), T)
