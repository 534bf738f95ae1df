"""Small decoders, each chosen because a plausible shortcut would get it wrong.

Those in CONVERT are causal decoders in disguise and must be exact; those in REFUSE mix tokens, or count them, in a way
a token tree cannot keep, and must be refused. A silent wrong answer fails in either list.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from modules import CONTEXT, DIM, HEADS, VOCAB, Tiny
from oracles import EAGER, assert_decodes
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from zoo import spread

import treespec_compiler as treespec

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


# Masks


@converts
class Difference(Tiny):
    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return q - k >= 0


@converts
class NotLater(Tiny):
    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return ~(k > q)


@converts
class Additive(Tiny):
    def mask(self, tokens: int) -> Tensor:
        return (1 - torch.tril(torch.ones(tokens, tokens))) * -1e9


@converts
class TriuInfinity(Tiny):
    def mask(self, tokens: int) -> Tensor:
        return torch.triu(torch.full((tokens, tokens), float("-inf")), 1)[None, None]


@converts
class WhereInfinity(Tiny):
    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return torch.where(k <= q, 0.0, float("-inf"))


@converts
class FloatBuffer(Tiny):
    def setup(self) -> None:
        self.register_buffer("bias", torch.triu(torch.full((1, 1, CONTEXT, CONTEXT), -1e30), 1))

    def mask(self, tokens: int) -> Tensor:
        return self.bias[:, :, :tokens, :tokens]


@converts
class WindowOfTheWholeBuffer(Tiny):
    """The window is as wide as the buffer: within the buffer it is causal, and the context ends with it."""

    def setup(self) -> None:
        seen = torch.tril(torch.ones(48, 48)) * torch.triu(torch.ones(48, 48), -47)
        self.register_buffer("seen", seen.bool())

    def mask(self, tokens: int) -> Tensor:
        return self.seen[:tokens, :tokens]


@converts
class BandBuffer(Tiny):
    """Wider than the trace is long: the window shows only in the buffer's far corner."""

    def setup(self) -> None:
        seen = torch.tril(torch.ones(CONTEXT, CONTEXT)) * torch.triu(torch.ones(CONTEXT, CONTEXT), -19)
        self.register_buffer("seen", seen.bool())

    def mask(self, tokens: int) -> Tensor:
        return self.seen[:tokens, :tokens]


@converts
class TwoMasks(Tiny):
    """A window in the first layer, causal in the second."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        i, j = _indices(q.shape[2])
        seen = (j <= i) & (i - j < 3) if layer == 0 else j <= i
        return scaled_dot_product_attention(q, k, v, seen)


@converts
class WindowAsTwoLines(Tiny):
    def mask(self, tokens: int) -> Tensor:
        ones = torch.ones(tokens, tokens, dtype=torch.bool)
        return ones.tril() & ~ones.tril(-5)


@refused("off-by-one")
class Strict(Tiny):
    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return (k < q) | ((q == 0) & (k == 0)) if False else k < q


@refused("1 later token")
class OneFuture(Tiny):
    def mask(self, tokens: int) -> Tensor:
        return torch.ones(tokens, tokens, dtype=torch.bool).tril(1)


@refused("distance")
class FirstTokenAlwaysSeen(Tiny):
    """An attention sink: a window plus token 0."""

    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return (k <= q) & ((q - k < 3) | (k == 0))


@refused("gap")
class Dilated(Tiny):
    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return (k <= q) & (q - k != 2)


@refused("later token")
class Reversed(Tiny):
    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return k >= q


@refused("")
class PrefixLM(Tiny):
    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return (k <= q) | (k < 4)


@refused("content of the tokens")
class Padding(Tiny):
    def forward(self, ids: Tensor) -> Tensor:
        self_mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        seen = self_mask & (ids != 0)[:, None, :]
        x = self.start(ids)
        q, k, v = (self.split(p) for p in self.qkv[0](x).chunk(3, -1))
        return self.finish(x + self.join(scaled_dot_product_attention(q, k, v, seen[:, None])))


@refused("")
class FlippedBuffer(Tiny):
    """The lower right corner of a buffer, anchored at its end."""

    def setup(self) -> None:
        self.register_buffer("seen", torch.ones(CONTEXT, CONTEXT).triu().flip(1).bool())

    def mask(self, tokens: int) -> Tensor:
        return self.seen[CONTEXT - tokens :, :tokens]


@refused("")
class BranchOnLength(Tiny):
    """Windowed only for prompts longer than the trace."""

    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return (k <= q) & (q - k < 6) if tokens > 30 else k <= q


@refused("")
class BranchBeyondABranch(Tiny):
    """The first other side is the same program; the one behind it is not."""

    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        if tokens < 20:
            return k <= q
        if tokens < 50:
            return k <= q
        return (k <= q) & (q - k < 6)


@refused("does something else")
class OtherWeights(Tiny):
    """Both sides are op for op the same; the weights differ."""

    def setup(self) -> None:
        self.long = nn.Linear(DIM, VOCAB, bias=False)

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x) if x.shape[1] < 24 else self.long(x)


@refused("one token")
class OneTokenBranch(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x) * 2 if x.shape[1] == 1 else self.head(x)


# Positions


@converts
class ArangePlusZero(Tiny):
    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(torch.arange(ids.shape[1]) + 0)


@converts
class CountedOnes(Tiny):
    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(torch.ones_like(ids).cumsum(1) - 1)


@converts
class PositionBuffer(Tiny):
    def setup(self) -> None:
        self.register_buffer("position_ids", torch.arange(CONTEXT)[None])

    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(self.position_ids[:, : ids.shape[1]])


@converts
class ShuffledPositionBuffer(Tiny):
    """A buffer of positions need not count: its values are read, not replaced."""

    def setup(self) -> None:
        self.register_buffer("position_ids", torch.randperm(CONTEXT)[None])

    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(self.position_ids[:, : ids.shape[1]])


@converts
class TableSlice(Tiny):
    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe.weight[3 : 3 + ids.shape[1]]


@converts
class ScaledKeys(Tiny):
    """Keys depend on their own position, not only through rope."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        steps = torch.arange(k.shape[2], dtype=torch.float32)
        return super().attend(q, k * (1 + 0.1 * steps)[:, None], v, layer)


@converts
class HalfPrecisionPositions(Tiny):
    """bfloat16 counts to 256 only: `i + 1` is rounded before and after."""

    def positions(self, ids: Tensor) -> Tensor:
        steps = torch.arange(ids.shape[1]).to(torch.bfloat16) / 8 + 1
        return super().positions(ids) * steps[:, None].float()


@refused("")
class Clamped(Tiny):
    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(torch.arange(ids.shape[1]).clamp(max=7))


@refused("")
class Wrapped(Tiny):
    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(torch.arange(ids.shape[1]) % 8)


@refused("")
class Backwards(Tiny):
    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(ids.shape[1] - 1 - torch.arange(ids.shape[1]))


@refused("")
class FromTheEnd(Tiny):
    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(torch.arange(-ids.shape[1], 0) + CONTEXT)


@refused("")
class Normalised(Tiny):
    def positions(self, ids: Tensor) -> Tensor:
        steps = torch.arange(ids.shape[1]).float()
        return super().positions(ids) * (steps / steps.max())[:, None]


@refused("")
class WrappedIndex(Tiny):
    """An index of -1 reads the last element, so this is a roll."""

    def positions(self, ids: Tensor) -> Tensor:
        steps = torch.arange(ids.shape[1])
        return self.wpe(steps[steps - 1])


@refused("number of tokens")
class LengthScaled(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x) * x.shape[1]


@refused("number of tokens")
class RootLengthScaled(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x) / math.sqrt(x.shape[1])


# Layouts


@converts
class TokensFirst(Tiny):
    """[T, 1, C] inside."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x.transpose(0, 1)).transpose(0, 1)


@converts
class FlatTokens(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x.view(-1, DIM)).view(x.shape[0], -1, VOCAB)


@converts
class Squeezed(Tiny):
    """A tree of one node must not lose its token dimension."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x.squeeze()).unsqueeze(0)


@converts
class BatchNormEval(Tiny):
    def setup(self) -> None:
        self.norm = nn.BatchNorm1d(DIM)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def finish(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x.transpose(1, 2)).transpose(1, 2))


@converts
class TwoCalls(Tiny):
    """One attention module, two sites: each needs K/V of its own."""

    def block(self, x: Tensor, layer: int) -> Tensor:
        return super().block(super().block(x, 0), 0)


@converts
class SwappedQueryAndKey(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return super().attend(k, q, v, layer)


@converts
class SharedKeys(Tiny):
    """The second layer attends to the first one's keys and values."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.start(ids)
        q, k, v = (self.split(p) for p in self.qkv[0](x).chunk(3, -1))
        x = x + self.join(super().attend(q, k, v, 0))
        q = self.split(self.qkv[1](x)[..., :DIM])
        return self.finish(x + self.join(super().attend(q, k, v, 1)))


@converts
class TiledHeads(Tiny):
    """`repeat` orders heads 0 1 0 1, `repeat_interleave` 0 0 1 1."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return super().attend(q, k[:, :2].repeat(1, 2, 1, 1), v[:, :2].repeat(1, 2, 1, 1), layer)


@converts
class InterleavedHeads(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return super().attend(q, k[:, :2].repeat_interleave(2, 1), v[:, :2].repeat_interleave(2, 1), layer)


@converts
class ExpandedHeads(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        def wide(x: Tensor) -> Tensor:
            return x[:, :2, None].expand(-1, -1, 2, -1, -1).reshape(q.shape)

        return super().attend(q, wide(k), wide(v), layer)


@converts
class OnlyKeysRepeated(Tiny):
    """Keys are shared by two heads in one way, values in the other."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return super().attend(q, k[:, :2].repeat_interleave(2, 1), v[:, :2].repeat(1, 2, 1, 1), layer)


@converts
class OneKeyHead(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return scaled_dot_product_attention(q, k[:, :1], v[:, :1], is_causal=True, enable_gqa=True)


@converts
class DictOutput(Tiny):
    def finish(self, x: Tensor) -> dict[str, Tensor]:
        return {"hidden": x, "logits": self.head(x)}


@converts
class Double(Tiny):
    def setup(self) -> None:
        self.double()


@converts
class TableByProduct(Tiny):
    """Rope-like angles from an outer product, computed in the graph."""

    def positions(self, ids: Tensor) -> Tensor:
        steps = torch.arange(ids.shape[1], dtype=torch.float32)
        return torch.outer(steps, 0.3 ** torch.arange(DIM)).cos()


@converts
class SoftmaxOverFeatures(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x * x.softmax(-1)).log_softmax(-1)


@refused("aten.reshape mixes tokens")
class ViewedHeads(Tiny):
    """[1, T, C].view(1, H, T, D) without a transpose mixes tokens into heads."""

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], HEADS, x.shape[1], -1)


@refused("aten.reshape mixes tokens")
class JoinedWithoutTranspose(Tiny):
    def join(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[2], -1)


@refused("not the tokens")
class AttentionOverHeads(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)


@refused("")
class SoftmaxOverTokens(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x.softmax(1))


@refused("")
class PooledByVector(Tiny):
    """matmul with a vector drops a dimension; the softmax that follows runs over the tokens."""

    def setup(self) -> None:
        self.vector = nn.Parameter(torch.randn(DIM))

    def finish(self, x: Tensor) -> Tensor:
        weights = (x @ self.vector).softmax(-1)
        return self.head(x * weights.view(1, -1, 1))


@refused("aten.mean")
class Centred(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x - x.mean(1, keepdim=True))


@refused("aten.slice")
class FirstToken(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x + x[:, :1])


@refused("")
class LastTokenOnly(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x[:, -1:])


@refused("")
class LearnedPrefix(Tiny):
    def setup(self) -> None:
        self.prefix = nn.Parameter(torch.randn(1, 2, DIM))

    def start(self, ids: Tensor) -> Tensor:
        return torch.cat([self.prefix, super().start(ids)], 1)


@refused("aten.flip")
class Flipped(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x.flip(1))


@refused("")
class NormOverTokens(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head((x - x.mean((1, 2), keepdim=True)) / x.std((1, 2), keepdim=True))


@refused("aten.roll")
class RolledValues(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return super().attend(q, k, v.roll(1, 2), layer)


@refused("")
class ShiftedTokens(Tiny):
    def start(self, ids: Tensor) -> Tensor:
        return super().start(ids) + self.embed(pad(ids, (1, 0))[:, :-1])


@refused("")
class ConstantQueries(Tiny):
    """Queries are learned, keys are tokens: perceiver-like."""

    def setup(self) -> None:
        self.latents = nn.Parameter(torch.randn(1, HEADS, 5, DIM // HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        pooled = scaled_dot_product_attention(self.latents, k, v)
        return super().attend(q, k, v, layer) + pooled.mean(2, keepdim=True)


@refused("")
class MixingMatrix(Tiny):
    """MLP-mixer: a causal matrix over tokens."""

    def setup(self) -> None:
        self.mix = nn.Parameter(torch.randn(CONTEXT, CONTEXT).tril())

    def finish(self, x: Tensor) -> Tensor:
        return self.head(self.mix[: x.shape[1], : x.shape[1]] @ x)


@refused("")
class GramMatrix(Tiny):
    """Linear attention: every token's outer product, summed."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x @ (x.transpose(1, 2) @ x))


@refused("")
class NamelessOutput(Tiny):
    def finish(self, x: Tensor) -> dict[str, Tensor]:
        return {"hidden": x, "scores": self.head(x)}


def build(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return spread(cls())


@pytest.mark.parametrize("name", CONVERT)
def test_converts_exactly(name: str) -> None:
    model: Any = build(CONVERT[name])
    program = treespec.tree_program(model, options=EAGER)
    assert_decodes(model, program, VOCAB, rounds=2, prompt=9)
    cache = program.new_cache(4)
    alone = program.verify(treespec.TokenTree([5], [-1]), cache)  # a tree of one node, no prefix
    assert alone.shape == (1, VOCAB)


@pytest.mark.parametrize("name", REFUSE)
def test_is_refused(name: str) -> None:
    cls, words = REFUSE[name]
    with pytest.raises(treespec.Unsupported) as caught:
        treespec.tree_program(build(cls), options=EAGER)
    assert words in caught.value.reason


def test_half_and_half() -> None:
    assert len(CONVERT) >= 25 and len(REFUSE) >= 25
