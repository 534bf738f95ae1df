"""Sinks applied after attention, what is constant along a row, and scores that are replaced: exact, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import EAGER, assert_decodes
from pass_cases import applied, only
from scored_modules import HEADS, VOCAB, WIDTH, Attention, Sinks, built
from torch import Tensor, nn

import treespec_compiler as treespec
from treespec_compiler.passes import recognize_attention as recognize


class Gated(Attention):
    """The output times sigmoid(logsumexp(scores) - sink), one sink a head."""

    def __init__(self) -> None:
        super().__init__(kv_heads=2)
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, HEADS, self.dim).transpose(1, 2)
        k, v = self.kv(x).view(b, t, 2, self.kv_heads, self.dim).permute(2, 0, 3, 1, 4)
        k, v = (y.repeat_interleave(HEADS // self.kv_heads, 1) for y in (k, v))
        s = self.scores(q, k, t)
        y = self.gated(s.softmax(-1) @ v, s, t)
        return self.out(y.transpose(1, 2).reshape(b, t, WIDTH))

    def gated(self, y: Tensor, s: Tensor, t: int) -> Tensor:
        return y * (s.logsumexp(-1) - self.sinks.view(1, -1, 1)).sigmoid().unsqueeze(-1)


class KeptDimension(Gated):
    """The factor first, and dimensions kept instead of added."""

    def gated(self, y: Tensor, s: Tensor, t: int) -> Tensor:
        return torch.sigmoid(s.logsumexp(-1, keepdim=True) - self.sinks[:, None, None]) * y


class Windowed(Gated):
    """A window and a distance bias under the gate."""

    def scores(self, q: Tensor, k: Tensor, t: int) -> Tensor:
        i = torch.arange(t)
        gap = i[:, None] - i[None, :]
        s = q @ k.transpose(-1, -2) * 0.4 - 0.25 * gap
        return s.masked_fill((gap < 0) | (gap >= 5), -1e9)


class Unmasked(Gated):
    """The sum runs over other scores: before the mask."""

    def gated(self, y: Tensor, s: Tensor, t: int) -> Tensor:
        return super().gated(y, s.clamp(min=-3.0), t)


class OtherSign(Gated):
    def gated(self, y: Tensor, s: Tensor, t: int) -> Tensor:
        return y * (self.sinks.view(1, -1, 1) - s.logsumexp(-1)).sigmoid().unsqueeze(-1)


class OverQueries(Gated):
    def gated(self, y: Tensor, s: Tensor, t: int) -> Tensor:
        return y * (s.logsumexp(-2) - self.sinks.view(1, -1, 1)).sigmoid().unsqueeze(-1)


class SinkAToken(Gated):
    """Sinks that grow with the position of the query."""

    def gated(self, y: Tensor, s: Tensor, t: int) -> Tensor:
        sinks = self.sinks.view(1, -1, 1) * torch.arange(t)
        return y * (s.logsumexp(-1) - sinks).sigmoid().unsqueeze(-1)


class OneSinkForAll(Gated):
    """One number for every head: correct, but not the form that is known."""

    def gated(self, y: Tensor, s: Tensor, t: int) -> Tensor:
        return y * (s.logsumexp(-1) - self.sinks[:1]).sigmoid().unsqueeze(-1)


class UsedTwice(Gated):
    """What the gate multiplies is also used without it."""

    def gated(self, y: Tensor, s: Tensor, t: int) -> Tensor:
        return super().gated(y, s, t) + y


class ShiftedGate(Gated):
    """A constant that a softmax does not see, and a gate does."""

    def scores(self, q: Tensor, k: Tensor, t: int) -> Tensor:
        return super().scores(q, k, t) + 2.0


class AlibiGate(Gated):
    """slope * k: for a softmax the same as slope * (k - q)."""

    def scores(self, q: Tensor, k: Tensor, t: int) -> Tensor:
        return super().scores(q, k, t) + 0.25 * torch.arange(t)


class AlibiSinks(Sinks):
    """The same beside a sink's column."""

    def scores(self, q: Tensor, k: Tensor, t: int) -> Tensor:
        return super().scores(q, k, t) + 0.25 * torch.arange(t)


class MaximumBeforeSinks(Sinks):
    """The maximum is taken off the scores, but not off the sink."""

    def scores(self, q: Tensor, k: Tensor, t: int) -> Tensor:
        s = super().scores(q, k, t)
        return s - s.amax(-1, keepdim=True)


class DistanceSinks(Sinks):
    """A bias by distance is the same for every row's constant: nothing is left out of it."""

    def scores(self, q: Tensor, k: Tensor, t: int) -> Tensor:
        i = torch.arange(t)
        gap = (i[:, None] - i[None, :]).clamp(min=0)
        return super().scores(q, k, t) + (1.0 - gap.float().sqrt())


class ShiftedCap(Attention):
    """The constant comes before the softcap, which sees it."""

    def scores(self, q: Tensor, k: Tensor, t: int) -> Tensor:
        s = q @ k.transpose(-1, -2) * 0.4 + 1.0
        return (3 * torch.tanh(s / 3)).masked_fill(torch.ones(t, t).triu(1) == 1, -torch.inf)


class ZeroFarAway(Attention):
    """Far keys are seen with a score of zero: no window."""

    def scores(self, q: Tensor, k: Tensor, t: int) -> Tensor:
        i = torch.arange(t)
        gap = i[:, None] - i[None, :]
        return (q @ k.transpose(-1, -2)).masked_fill(gap >= 4, 0.0).masked_fill(gap < 0, -torch.inf)


class ZeroThenHidden(Attention):
    """Scores of later keys become zero, and then the mask hides them."""

    def scores(self, q: Tensor, k: Tensor, t: int) -> Tensor:
        seen = torch.ones(t, t).tril()
        return q @ k.transpose(-1, -2) * seen - 1e9 * (1 - seen)


@pytest.mark.parametrize("attention", [Gated, KeptDimension, Windowed, DistanceSinks])
def test_exact(attention: Any) -> None:
    model = built(attention)
    program = treespec.tree_program(model, options=EAGER)
    assert all(site.sinks for site in program.sites) and len(program.sites) == 2
    assert_decodes(model, program, VOCAB, rounds=2)


def test_replaced_scores_that_are_hidden() -> None:
    model = built(ZeroThenHidden)
    assert_decodes(model, treespec.tree_program(model, options=EAGER), VOCAB, rounds=1)


@pytest.mark.family
@pytest.mark.parametrize(
    "attention",
    [
        Unmasked,
        OtherSign,
        OverQueries,
        SinkAToken,
        OneSinkForAll,
        UsedTwice,
        ShiftedGate,
        AlibiGate,
        AlibiSinks,
        MaximumBeforeSinks,
        ShiftedCap,
        ZeroFarAway,
    ],
)
def test_refused(attention: Any) -> None:
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(built(attention), options=EAGER)
    assert refusal.value.source is not None and ".py:" in refusal.value.source


def test_replaced_scores_are_named() -> None:
    with pytest.raises(treespec.Unsupported, match="replaced by another value") as refusal:
        treespec.tree_program(built(ZeroFarAway), options=EAGER)
    assert "gap >= 4" in str(refusal.value.source)


def test_the_gate_becomes_an_argument() -> None:
    """Before: softmax, logsumexp and a product. After: one attention a layer, with sinks [heads]."""
    old, new, matches, state = applied(built(Gated), recognize.PASS)
    parts = ("aten.softmax", "aten.logsumexp", "aten.sigmoid", "treespec.attention")
    assert only(old, *parts) == ["aten.softmax", "aten.logsumexp", "aten.sigmoid"] * 2
    assert only(new, *parts) == ["treespec.attention"] * 2 and matches == 2
    for node in state.graph.nodes:
        if node.target is torch.ops.treespec.attention.default:
            assert tuple(node.args[7].meta["val"].shape) == (HEADS,)
