"""Experts run one after the other on rows split by count: one grouped matmul where that is proved, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from modules import DIM, VOCAB, Tiny
from oracles import EAGER, assert_decodes
from test_passes import applied, only
from torch import Tensor, nn
from zoo import spread

import treespec_compiler as treespec
from treespec_compiler.ir.grouped_linear import _every_group, grouped_linear
from treespec_compiler.passes import normalize

EXPERTS, CHOICES = 4, 2


class Split(Tiny):
    """Two of four experts a token: rows sorted by expert, split by how many each got, and added up again."""

    layers = 1

    def setup(self) -> None:
        self.router, self.other = nn.Linear(DIM, EXPERTS), nn.Linear(DIM, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * DIM, DIM) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, DIM, DIM) * 0.3)

    def block(self, x: Tensor, layer: int) -> Tensor:
        x = super().block(x, layer)
        return x + self.mixture(x[0])[None]

    def mixture(self, x: Tensor) -> Tensor:
        logits, ids = self.router(x).topk(CHOICES, dim=1)
        counts = self.counts(x, ids)
        order = self.order(ids.flatten())
        of = order.div(CHOICES, rounding_mode="trunc")
        gates = logits.softmax(1).flatten()[order]
        a, b = self.experts(x[of], self.up, counts).chunk(2, dim=-1)
        y = self.experts(torch.relu(a) * b, self.down, counts) * gates[:, None]
        return torch.zeros_like(x).index_add(0, of, y)

    def counts(self, x: Tensor, ids: Tensor) -> list[int]:
        marks = torch.zeros(x.shape[0], EXPERTS).scatter(1, ids, 1)
        return marks.long().sum(0).tolist()

    def order(self, ids: Tensor) -> Tensor:
        return ids.sort(0)[1]

    def experts(self, rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        parts = rows.split(counts, dim=0)
        return torch.cat([nn.functional.linear(parts[i], weight[i]) for i in range(EXPERTS)], dim=0)


class Unsorted(Split):
    def order(self, ids: Tensor) -> Tensor:
        return torch.zeros_like(ids).sort(0, stable=True)[1]


class Descending(Split):
    def order(self, ids: Tensor) -> Tensor:
        return ids.sort(0, descending=True)[1]


class OthersCounts(Split):
    """The counts of another router's choices."""

    def counts(self, x: Tensor, ids: Tensor) -> list[int]:
        return super().counts(x, self.other(x).topk(CHOICES, dim=1)[1])


class SwappedMatrices(Split):
    def experts(self, rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        parts = rows.split(counts, dim=0)
        return torch.cat([nn.functional.linear(parts[i], weight[EXPERTS - 1 - i]) for i in range(EXPERTS)], dim=0)


class SwappedParts(Split):
    def experts(self, rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        parts = rows.split(counts, dim=0)
        return torch.cat([nn.functional.linear(parts[i], weight[i]) for i in reversed(range(EXPERTS))], dim=0)


class CountedTwice(Split):
    """Marks of ids that may repeat within a token count less than the rows there are."""

    def counts(self, x: Tensor, ids: Tensor) -> list[int]:
        return super().counts(x, ids // 2)


def build(cls: Any) -> nn.Module:
    torch.manual_seed(0)
    return spread(cls()).eval()


def test_exact() -> None:
    model = build(Split)
    assert_decodes(model, treespec.tree_program(model, options=EAGER), VOCAB, rounds=2)


@pytest.mark.parametrize("cls", [Unsorted, Descending, OthersCounts, SwappedMatrices, SwappedParts, CountedTwice])
def test_refused(cls: type[Tiny]) -> None:
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(build(cls), options=EAGER)
    assert refusal.value.source is not None and "test_grouped_experts.py" in refusal.value.source


def test_one_matmul_for_all_experts() -> None:
    """Before: a split, a linear for each expert, and a cat. After: one grouped linear, and no size of run time."""
    parts = ("aten.split_with_sizes", "aten.item", "aten.histc", "treespec.grouped_linear")
    old, new, _, state = applied(build(Split), normalize.PASS)
    assert only(old, *parts) == ["aten.item"] * EXPERTS + ["aten.split_with_sizes"] * 2
    assert only(new, *parts) == ["aten.histc"] + ["treespec.grouped_linear"] * 2
    sizes = {str(s) for n in state.graph.nodes if isinstance(n.meta.get("val"), Tensor) for s in n.meta["val"].shape}
    assert not any(s.startswith("u") for s in sizes)


def test_matrices_in_another_order_are_left_alone() -> None:
    _, new, _, _ = applied(build(SwappedMatrices), normalize.PASS)
    assert "treespec.grouped_linear" not in new


@pytest.mark.parametrize("ends", [[3, 3, 5, 9], [0, 0, 0, 9], [9, 9, 9, 9], [2, 4, 7, 9]])
def test_both_ways_of_the_op(ends: list[int]) -> None:
    x, weight = torch.randn(9, 5), torch.randn(4, 6, 5)
    group = [next(e for e, end in enumerate(ends) if r < end) for r in range(9)]
    expected = torch.stack([weight[g] @ row for g, row in zip(group, x, strict=True)])
    for got in (grouped_linear(x, weight, torch.tensor(ends)), _every_group(x, weight, torch.tensor(ends))):
        torch.testing.assert_close(got, expected)


def test_the_op_is_traceable() -> None:
    arguments = (torch.randn(9, 5), torch.randn(4, 6, 5), torch.tensor([3, 3, 5, 9]))
    torch.library.opcheck(grouped_linear, arguments, test_utils=("test_schema", "test_faketensor"))
