"""Biases computed from the keys' tokens: cached with K where that is proved, and refused where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import EAGER, assert_decodes
from pass_cases import applied, only
from scored_modules import HEADS, VOCAB, WIDTH, Attention, built
from torch import Tensor, nn
from torch.nn import functional as F

import treespec_compiler as treespec
from treespec_compiler.passes import recognize_attention as recognize
from treespec_compiler.passes.attention.key_bias import _parts

LOWEST = float(torch.finfo(torch.float32).min)


class KeyBias(Attention):
    """exp(a * softplus(w v)) of each key's value, a number for each K/V head, added to the scores."""

    def __init__(self) -> None:
        super().__init__(kv_heads=2)
        self.dt = nn.Linear(2 * self.dim, self.biases())
        self.rate = nn.Parameter(0.3 * torch.randn(self.biases()))

    def biases(self) -> int:
        return self.kv_heads

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, HEADS, self.dim).transpose(1, 2)
        k, v = self.kv(x).view(b, t, 2, self.kv_heads, self.dim).permute(2, 0, 3, 1, 4)
        mask = self.mask(self.bias(v, t), t)
        k, v = (y.repeat_interleave(HEADS // self.kv_heads, 1) for y in (k, v))
        return self.out(self.attend(q, k, v, mask).transpose(1, 2).reshape(b, t, WIDTH))

    def bias(self, v: Tensor, t: int) -> Tensor:
        flat = v.transpose(1, 2).reshape(1, t, -1)
        return torch.exp(self.rate * F.softplus(self.dt(flat))).transpose(-1, -2)  # [1, heads, T]

    def mask(self, bias: Tensor, t: int) -> Tensor:
        later = torch.ones(t, t, dtype=torch.bool).triu(1)
        every = bias[:, :, None, :].expand(-1, -1, t, -1).masked_fill(later, LOWEST)
        return every.repeat_interleave(HEADS // every.shape[1], 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask)


class Spelled(KeyBias):
    """The same by matmul and softmax, with the bias added before the mask."""

    def mask(self, bias: Tensor, t: int) -> Tensor:
        return bias[:, :, None, :].repeat_interleave(2, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        t = q.shape[2]
        s = q @ k.transpose(-1, -2) * 0.3 + mask
        return s.masked_fill(torch.ones(t, t).triu(1) == 1, -torch.inf).softmax(-1) @ v


class OneForAllHeads(KeyBias):
    """One number a key, with a window in the same mask."""

    def biases(self) -> int:
        return 1

    def mask(self, bias: Tensor, t: int) -> Tensor:
        i = torch.arange(t)
        gap = i[:, None] - i[None, :]
        return torch.where((gap >= 0) & (gap < 5), bias[:, :, None, :], -torch.inf)


class ByQuery(KeyBias):
    """The bias of the query's token, the same for every key: nothing that K could hold."""

    def mask(self, bias: Tensor, t: int) -> Tensor:
        later = torch.ones(t, t, dtype=torch.bool).triu(1)
        return bias[:, :, :, None].expand(-1, -1, -1, t).masked_fill(later, LOWEST).repeat_interleave(2, 1)


class ByPair(KeyBias):
    def mask(self, bias: Tensor, t: int) -> Tensor:
        later = torch.ones(t, t, dtype=torch.bool).triu(1)
        pairs = (bias[:, :, None, :] * bias[:, :, :, None]).masked_fill(later, LOWEST)
        return pairs.repeat_interleave(2, 1)


class RunningSum(KeyBias):
    """The bias of a key depends on the tokens before it."""

    def bias(self, v: Tensor, t: int) -> Tensor:
        return super().bias(v, t).cumsum(-1)


class MeanOfValues(KeyBias):
    """The bias of a key depends on every token."""

    def bias(self, v: Tensor, t: int) -> Tensor:
        return super().bias(v - v.mean(2, keepdim=True), t)


class QueryHeads(KeyBias):
    """A bias for each query head: K/V heads are shared by two of them."""

    def biases(self) -> int:
        return HEADS


class HidesByContent(KeyBias):
    """A mask of token content in the place of a bias."""

    def bias(self, v: Tensor, t: int) -> Tensor:
        return (super().bias(v, t) > 1.0).float() * LOWEST


class HidesByTensors(KeyBias):
    """The same spelled with tensors, and an inversion."""

    def bias(self, v: Tensor, t: int) -> Tensor:
        kept = (super().bias(v, t) > 1.0).float()
        return torch.where(kept > 0, torch.zeros(()), (1.0 - kept) * torch.full((), -1e9))


class HiddenTooLittle(KeyBias):
    """What should hide later keys is a number that a bias can make up for."""

    def mask(self, bias: Tensor, t: int) -> Tensor:
        later = torch.ones(t, t, dtype=torch.bool).triu(1)
        return bias[:, :, None, :].expand(-1, -1, t, -1).masked_fill(later, -50.0).repeat_interleave(2, 1)


class ScaledAfterwards(Spelled):
    """The bias is scaled with the scores."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        t = q.shape[2]
        s = (q @ k.transpose(-1, -2) + mask) * 0.3
        return s.masked_fill(torch.ones(t, t).triu(1) == 1, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("attention", [KeyBias, Spelled, OneForAllHeads, QueryHeads])
def test_exact(attention: Any) -> None:
    model = built(attention)
    program = treespec.tree_program(model, options=EAGER)
    assert {site.key_dim - site.value_dim for site in program.sites} == {2 if attention is QueryHeads else 1}
    assert_decodes(model, program, VOCAB, rounds=2)


@pytest.mark.family
@pytest.mark.parametrize(
    ("attention", "words"),
    [
        (ByQuery, "content of the tokens"),
        (ByPair, "content of the tokens"),
        (RunningSum, "aten.cumsum mixes tokens"),
        (MeanOfValues, "aten.mean mixes tokens"),
        (HidesByContent, "content of the tokens"),
        (HidesByTensors, "content of the tokens"),
        (HiddenTooLittle, "content of the tokens"),
        (ScaledAfterwards, "no attention was recognized"),
    ],
)
def test_refused(attention: Any, words: str) -> None:
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(built(attention), options=EAGER)
    assert words in refusal.value.reason
    assert refusal.value.source is not None and ".py:" in refusal.value.source


def test_the_bias_becomes_a_dimension_of_k() -> None:
    """Before: a mask that depends on content. After: keys of one more dimension, and a mask that does not."""
    old, new, matches, state = applied(built(KeyBias), recognize.PASS)
    assert len(only(old, "aten.scaled_dot_product_attention")) == matches == 2
    assert len(only(new, "treespec.attention")) == 2
    for node in state.graph.nodes:
        if node.target is torch.ops.treespec.attention.default:
            q, k, v, mask = node.args[:4]
            sizes = [int(x.meta["val"].shape[-1]) for x in (q, k, v)]
            assert sizes == [9, 9, 8] and int(k.meta["val"].shape[1]) == 2
            assert "masked" not in str(mask.target) and str(mask.target) == "aten.where.self"


def test_the_constant_keeps_its_value_in_sixteen_bits() -> None:
    assert _parts(8.0, torch.bfloat16) == [8.0] and len(_parts(128**0.5, torch.float32)) == 1
    parts = _parts(128**0.5, torch.bfloat16)
    assert len(parts) == 2 and abs(sum(parts) / 128**0.5 - 1) < 1e-4
    assert all(float(torch.tensor(p).bfloat16()) == p for p in parts)


class Restricted(KeyBias):
    """Above 20 tokens only the 20 keys of the largest bias are seen."""

    def mask(self, bias: Tensor, t: int) -> Tensor:
        every = super().mask(bias, t)
        if t > 20:
            kept = torch.zeros_like(every).scatter(-1, every.topk(20, -1).indices, 1.0)
            every = every.masked_fill(kept == 0, LOWEST)
        return every


@pytest.mark.rare
def test_a_selection_of_keys_bounds_the_context() -> None:
    model = built(Restricted)
    program = treespec.tree_program(model, options=EAGER)
    assert program.max_context == 20
    cache = program.new_cache(64)
    program.prefill(list(range(20)), cache)
    with pytest.raises(treespec.errors.ContextOverflow, match="from 21 tokens on the model cannot be converted"):
        program.verify(treespec.TokenTree([1], [-1]), cache)
    assert_decodes(model, program, VOCAB, rounds=1, size=11, prompt=7)
