"""Decoders that were once converted wrongly or crashed: each is exact now, or refused for the reason that is so.

Every kind has more than one spelling, since a mended case is not a mended kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from modules import CONTEXT, VOCAB, Tiny
from oracles import EAGER, assert_decodes
from torch import Tensor, nn
from zoo import spread

import treespec_compiler as treespec
from treespec_compiler.errors import Refusal
from treespec_compiler.passes.forms.by_value import EACH

CONVERT: dict[str, type[nn.Module]] = {}
REFUSE: dict[str, tuple[type[nn.Module], str]] = {}


def converts(cls: type[nn.Module]) -> type[nn.Module]:
    CONVERT[cls.__name__] = cls
    return cls


def refused(words: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """`words` must occur in the reason."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        REFUSE[cls.__name__] = (cls, words)
        return cls

    return register


def _indices(tokens: int) -> tuple[Tensor, Tensor]:
    steps = torch.arange(tokens)
    return steps[:, None], steps[None, :]


def _scores(q: Tensor, k: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(hidden, float("-inf"))


# The values of a permutation depend on every token


@refused("depend on every token")
class RankAsFactor(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        rank = x[0, :, 0].argsort().argsort()
        return self.head(x * rank[None, :, None].float())


@refused("depend on every token")
class OrderAsPosition(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        order = x[0, :, 0].argsort()
        y = x[0][order] + self.wpe(order)
        return self.head(y[order.argsort()][None])


@refused("depend on every token")
class TableReadByOrder(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        order = x[0, :, 0].argsort()
        y = x[0][order] + self.wpe.weight[order]
        return self.head(y[order.argsort()][None])


@refused("depend on every token")
class FirstByRank(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        rank = x[0, :, 0].argsort(descending=True).argsort()
        return self.head(torch.where((rank < 3)[None, :, None], x, 2 * x))


@refused("depend on every token")
class ParityOfRank(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        rank = x[0, :, 0].argsort().argsort()
        return self.head(x * (rank % 2 * 2 - 1)[None, :, None])


# A table read at the token's place


@refused("at the token's place")
class RowsByPlace(Tiny):
    def setup(self) -> None:
        self.table = nn.Parameter(torch.randn(CONTEXT, VOCAB))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.table.gather(1, ids[0].unsqueeze(1))


@refused("at the token's place")
class ColumnsByPlace(Tiny):
    def setup(self) -> None:
        self.table = nn.Parameter(torch.randn(VOCAB, CONTEXT))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.table.gather(0, ids).unsqueeze(-1)


@converts
class RowsByToken(Tiny):
    def setup(self) -> None:
        self.table = nn.Parameter(torch.randn(VOCAB, VOCAB))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.table.gather(0, ids[0].unsqueeze(1).expand(-1, VOCAB))


# Bits, casts and regions that round


@refused("the bits of computed numbers")
class TruncatedMantissa(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head((x.view(torch.int32) & -4096).view(torch.float32))


@refused("rounded to torch.bfloat16")
class RoundedScores(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return _scores(q, k).to(torch.bfloat16).softmax(-1).to(torch.float32) @ v


@refused("rounded to torch.float16")
class RoundedSoftmax(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return torch.softmax(_scores(q, k), -1, dtype=torch.float16).float() @ v


@refused("rounded to torch.bfloat16")
class RoundedWeights(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return (_scores(q, k).softmax(-1).to(torch.bfloat16) @ v.to(torch.bfloat16)).float()


@refused("attention is computed in torch.bfloat16")
class RoundedAttention(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).float()


@refused("no attention was recognized")
class MaximumOfAnotherRow(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        scores = _scores(q, k)[0]
        parts = [(s - s.max(-1).values).softmax(-1) @ x for s, x in zip(scores, v[0], strict=True)]
        return torch.stack(parts)[None]


@refused("under torch.autocast")
class AutocastRegion(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.head(x).float()


@converts
class AutocastOff(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.head(x)


# Sizes where no size is expected


@refused("not a function of the distance")
class DiagonalOfHalf(Tiny):
    def mask(self, tokens: int) -> Tensor:
        ones = torch.ones(tokens, tokens, dtype=torch.bool)
        return ones.tril() & ones.triu(-(tokens // 2))


@refused("depends on the number of tokens")
class FeaturesFromLength(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        start = x.shape[1] // 64
        return self.head(x + x[..., start : start + 1])


@refused("returns no logits")
class LossAlone(Tiny):
    def finish(self, x: Tensor) -> Any:
        return None, self.head(x).mean()


# The number of tokens in a small type, as a constant


@refused("total number of tokens")
class LengthInBfloat16(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x * torch.full((1,), x.shape[1], dtype=torch.bfloat16).float().log())


@refused("total number of tokens")
class LengthInInt16(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        bucket = torch.full((1,), x.shape[1] // 8, dtype=torch.int16)
        return self.head(x + self.wpe(bucket.long()))


@refused("total number of tokens")
class OneLengthByArithmetic(Tiny):
    """1 at 1777 tokens, and 0 at others."""

    def finish(self, x: Tensor) -> Tensor:
        away = (x.shape[1] * x.shape[1] % 4093 - 2026) ** 2
        return self.head(x * (1 + torch.full((1,), 1 // (1 + away), dtype=torch.int16)))


@refused("total number of tokens")
class LengthThatRounds(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        tokens = torch.full((1,), x.shape[1], dtype=torch.float32)
        return self.head(x * (1 + tokens / 7 * 7 - tokens) + self.wpe((tokens / 7 * 7 - tokens + 1).long()))


# What is so by algebra, and not by value


@refused("disagrees with its values")
class Overflow(Tiny):
    def mask(self, tokens: int) -> Tensor:
        p = torch.arange(tokens, dtype=torch.int32) * 100_000_000
        return p[None, :] <= p[:, None]


@refused("disagrees with its values")
class RoundedPositionsInMask(Tiny):
    def mask(self, tokens: int) -> Tensor:
        p = torch.arange(tokens) * 0.7 / 0.7
        return (p[None, :] <= p[:, None]) & (p[:, None] - p[None, :] < 8)


@refused("disagrees with its values")
class AbsorbedWindow(Tiny):
    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        p, r = q + (2.0**24 - 30), k + (2.0**24 - 30)
        return (r <= p) & (p - r < 6)


@refused("disagrees with its values")
class OverflowingSlopes(Tiny):
    def mask(self, tokens: int) -> Tensor:
        p = torch.arange(tokens, dtype=torch.int32)
        bias = (p[None, :] - p[:, None]) * 100_000_000
        return bias.float().mul(1e-8).masked_fill(p[None, :] > p[:, None], float("-inf"))


@refused("hide less than they seem to")
class HiddenBesideAKeyBias(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        rows, columns = _indices(q.shape[2])
        bias = k[..., :1].transpose(-1, -2) * 3000
        hidden = torch.where(columns <= rows, 0.0, -1e4)
        return ((q @ k.transpose(-1, -2)) + bias + hidden).softmax(-1) @ v


@refused("something that forward does is not in it")
class ScoresThatAMaskDoesNotHide(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        rows, columns = _indices(q.shape[2])
        scores = q @ k.transpose(-1, -2) * 1e4
        return (scores + torch.where(columns <= rows, 0.0, -65504.0)).softmax(-1) @ v


@converts
class RoundedPositions(Tiny):
    """Not i for every i; a function of the position all the same."""

    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe((torch.arange(ids.shape[1]) / 7 * 7).long())


@converts
class RootOfASquare(Tiny):
    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe((torch.arange(ids.shape[1]).float().sqrt() ** 2).long())


@converts
class BiasInChunks(Tiny):
    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        near = (q - k).clamp(min=0).float().sqrt().neg()
        return torch.where((k <= q) & (q // 7 == k // 7), near, float("-inf"))


@converts
class SlopesOfFarNumbers(Tiny):
    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        slopes = (torch.arange(4) + 1.0) * 0.0137
        return ((4096.0 + k - q) * slopes[:, None, None]).masked_fill(k > q, float("-inf"))


@converts
class LearnedBiasOfAShortTable(Tiny):
    def setup(self) -> None:
        self.bias = nn.Parameter(torch.randn(256))

    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return self.bias[(q - k).clamp(min=0)].masked_fill(k > q, float("-inf"))


@converts
class LogOfAMask(Tiny):
    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return (k <= q).float().log()


@converts
class TwoConditions(Tiny):
    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return (k <= q) & ((q - k).abs() < 5) & ((k - q).clamp(min=0) == 0)


@refused("gap")
class EverySecondOfNine(Tiny):
    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return (k <= q) & ((q - k).abs() < 9) & ((q - k) % 2 == 0)


def _model(cls: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    model = cls().eval()
    spread(model)
    return model


@pytest.mark.family
@pytest.mark.parametrize("name", CONVERT)
def test_exact(name: str) -> None:
    model = _model(CONVERT[name])
    assert_decodes(model, treespec.tree_program(model, options=EAGER), VOCAB, rounds=2, prompt=17)


@pytest.mark.family
@pytest.mark.parametrize("name", REFUSE)
def test_refused(name: str) -> None:
    cls, words = REFUSE[name]
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(_model(cls), options=EAGER)
    assert words in refusal.value.reason


def test_a_program_made_under_autocast_is_the_model_itself() -> None:
    model = _model(Tiny)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        program = treespec.tree_program(model, options=EAGER)
    assert_decodes(model, program, VOCAB, rounds=1)


class EvenByArithmetic(Tiny):
    """The same number for any number of tokens, which is known by looking at each."""

    def positions(self, ids: Tensor) -> Tensor:
        return torch.arange(ids.shape[1])[:, None] * self.wpe.weight[0] * 0.01

    def finish(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        return self.head(x * (1 + torch.full((1,), (tokens * tokens + tokens) % 2, dtype=torch.int16)))


@pytest.mark.rare
def test_a_context_ends_where_arithmetic_on_the_length_is_not_looked_at_any_more() -> None:
    model = _model(EvenByArithmetic)
    program = treespec.tree_program(model, options=EAGER)
    assert program.max_context is not None and 257 < program.max_context <= EACH  # fewer on a slow machine
    assert_decodes(model, program, VOCAB, rounds=1, prompt=17)


class Overcome(Tiny):
    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return torch.where(k <= q, 0.0, -1e9) + ((q - k).float() ** 2) * 1e5


def test_a_context_ends_where_a_bias_overcomes_what_hides() -> None:
    model = _model(Overcome)
    program = treespec.tree_program(model, options=EAGER)
    # Key q + 101 is shown 1e5 * 101 ** 2 - 1e9 > 0: seen by the first query of 102 tokens.
    assert program.max_context is not None and program.max_context < 102
    assert_decodes(model, program, VOCAB, rounds=2, prompt=17)


class OneTokenApart(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x) * 1.4 if x.shape[1] == 1 else self.head(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_function_of_one_token_is_no_rounding(dtype: torch.dtype) -> None:
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(_model(OneTokenApart).to(dtype), options=EAGER)
    assert refusal.value.kind is Refusal.BRANCH
