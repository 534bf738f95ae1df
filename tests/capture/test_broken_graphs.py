"""Models that give no single graph: the line, the module, the reason, and a way out that works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import DIM, VOCAB, Tiny
from oracles import EAGER, assert_decodes
from torch import Tensor, nn
from zoo import spread

import treespec_compiler as treespec
from treespec_compiler import grouped_linear

EXPERTS, CHOICES = 4, 2


class HitExperts(nn.Module):
    """A loop over the experts that some token chose."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, EXPERTS)
        self.weight = nn.Parameter(torch.randn(EXPERTS, DIM, DIM) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        gates, ids = self.router(x).softmax(-1).topk(CHOICES, -1)
        mask = nn.functional.one_hot(ids, EXPERTS).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e in (mask.sum((-1, -2)) > 0).nonzero():  # here
            slot, token = torch.where(mask[e[0]])
            rows = x[token] @ self.weight[e[0]].t()
            out.index_add_(0, token, rows * gates[token, slot, None])
        return out


class BiasOfHitExperts(HitExperts):
    """Every token is given something for each expert that any token chose."""

    def forward(self, x: Tensor) -> Tensor:
        _, ids = self.router(x).softmax(-1).topk(CHOICES, -1)
        mask = nn.functional.one_hot(ids, EXPERTS).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e in (mask.sum((-1, -2)) > 0).nonzero():  # here
            out = out + self.weight[e[0], 0]
        return out


class ManyHitExperts(HitExperts):
    """More than are traced one by one."""

    def forward(self, x: Tensor) -> Tensor:
        gates, ids = self.router(x).softmax(-1).topk(CHOICES, -1)
        mask = nn.functional.one_hot(ids, 65).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e in (mask.sum((-1, -2)) > 0).nonzero():  # here
            slot, token = torch.where(mask[e[0]])
            out.index_add_(0, token, x[token] @ self.weight[e[0]].t() * gates[token, slot, None])
        return out


class SortedExperts(HitExperts):
    """The same numbers, as docs/refusals.md says."""

    def forward(self, x: Tensor) -> Tensor:
        gates, ids = self.router(x).softmax(-1).topk(CHOICES, -1)
        order = ids.flatten().argsort()
        ends = torch.histc(ids.flatten().float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
        rows = grouped_linear(x[order // CHOICES], self.weight, ends)
        rows = rows * gates.flatten()[order][:, None]
        return torch.zeros_like(x).index_add(0, order // CHOICES, rows)


class BranchOnContent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # here
            return x
        return x * 2


class Mixture(Tiny):
    part: type[nn.Module] = HitExperts
    layers = 1

    def setup(self) -> None:
        self.part_of = nn.ModuleList(self.part() for _ in range(self.layers))

    def block(self, x: Tensor, layer: int) -> Tensor:
        return x + self.part_of[layer](super().block(x, layer)[0])[None]


def mixture(part: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return spread(type("Model", (Mixture,), {"part": part})()).eval()


def refusal(model: nn.Module) -> treespec.Unsupported:
    with pytest.raises(treespec.Unsupported) as caught:
        treespec.tree_program(model, options=EAGER)
    return caught.value


@pytest.mark.parametrize("part", [BiasOfHitExperts, ManyHitExperts])
def test_a_loop_over_the_experts_that_were_hit(part: type[nn.Module]) -> None:
    error = refusal(mixture(part))
    assert "its code loops over values that are known only when it runs" in error.reason
    assert (error.layer, error.module) == ("part_of.0", part.__name__)
    assert "# here" in str(error.source) and "sorted by expert" in str(error.way_out)


def test_the_way_out_of_the_loop_works() -> None:
    """And a loop of which every turn does nothing where nobody chose the expert is gone through whole."""
    loop, ordered = mixture(HitExperts), mixture(SortedExperts)
    assert_decodes(loop, treespec.tree_program(loop, options=EAGER), VOCAB, rounds=2)
    ordered.load_state_dict(loop.state_dict())
    assert_decodes(loop, treespec.tree_program(ordered, options=EAGER), VOCAB, rounds=2)


def test_a_branch_on_content() -> None:
    error = refusal(mixture(BranchOnContent))
    assert error.module == "BranchOnContent" and "# here" in str(error.source)
    assert "one graph" in error.reason


class TestTransformers:
    """The loops of transformers, and what helps each of them."""

    def small(self, name: str, **fields: Any) -> nn.Module:
        pytest.importorskip("transformers")
        from treespec_compiler.cli.coverage.models import tiny_model

        return tiny_model(name, **fields)

    @pytest.mark.rare
    def test_where_transformers_offers_another_implementation(self) -> None:
        model = self.small("mixtral")
        model.set_experts_implementation("eager")  # type: ignore[operator]
        error = refusal(model)
        assert error.module == "MixtralExperts" and error.layer == "model.layers.0.mlp.experts"
        assert "model.set_experts_implementation('grouped_mm')" in str(error.way_out)
        model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
        assert treespec.tree_program(model, options=EAGER).sites

    @pytest.mark.family
    @pytest.mark.parametrize(("name", "experts"), [("dbrx", "DbrxExperts"), ("longcat_flash", "LongcatFlashExperts")])
    @pytest.mark.rare
    def test_what_the_documentation_says(self, name: str, experts: str) -> None:
        model, converted = self.small(name), self.small(name)
        assert_decodes(model, treespec.tree_program(model, options=EAGER), 96, rounds=1)
        text = (Path(__file__).parents[2] / "docs" / "refusals.md").read_text()
        block = next(b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if experts in b)
        exec(block, {"model": converted})
        assert_decodes(model, treespec.tree_program(converted, options=EAGER), 96, rounds=1)
