"""Decoders that are refused for what a layer does, and the same ones after what the refusal says was done to them."""

from __future__ import annotations

import math
from typing import Any

import torch
from decoders import HEAD, Style, future
from modules import CONTEXT, DIM, HEADS
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.testing._internal.two_tensor import TwoTensor
from ways import One, Way, becomes

import treespec_compiler as treespec


class Experts(One):
    """Those that were hit, in a loop over what is known at run time only."""

    def setup(self) -> None:
        self.router = nn.Linear(DIM, 3)
        self.expert = nn.Parameter(torch.randn(3, DIM, DIM))

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x + self.routed(x[0], self.router(x[0]).argmax(-1))[None])

    def routed(self, x: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in chosen.unique():
            rows = torch.where(chosen == e)[0]
            out[rows] = x[rows] @ self.expert[e].T
        return out


class SortedExperts(Experts):
    def routed(self, x: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.argsort()
        ends = torch.histc(chosen.float(), 3, 0, 2).cumsum(0, dtype=torch.int32)
        rows = treespec.grouped_linear(x[order], self.expert, ends)
        return torch.zeros_like(x).index_add(0, order, rows)


class OneMemory(One):
    """A K/V cache whose two buffers are parts of one."""

    def setup(self) -> None:
        both = self.caches()
        self.register_buffer("keys", both[0], persistent=False)
        self.register_buffer("values", both[1], persistent=False)

    def caches(self) -> Any:
        return torch.zeros(2, 1, HEADS, CONTEXT, HEAD)

    def forward(self, ids: Tensor, steps: Tensor) -> Tensor:
        x = self.embed(ids) + self.wpe(steps)
        q, k, v = (self.split(part) for part in self.qkv[0](self.norms[0](x)).chunk(3, -1))
        self.keys[:, :, steps] = k
        self.values[:, :, steps] = v
        seen = steps[:, None] >= torch.arange(CONTEXT)
        mixed = nn.functional.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=seen)
        return self.head(x + self.out[0](self.join(mixed)))


class TwoMemories(OneMemory):
    def caches(self) -> Any:
        return [torch.zeros(1, HEADS, CONTEXT, HEAD) for _ in range(2)]


def with_steps(ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids, torch.arange(ids.shape[1])


class ByErrorFunction(Style):
    """flex_attention with a mask by a function that nobody knows."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        t = q.shape[2]
        blocks = create_block_mask(lambda b, h, i, j: self.seen(b, h, i, j), None, None, t, t, device="cpu")
        out: Any = flex_attention(q, k, v, block_mask=blocks)
        return out

    def seen(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.erfc((i - j) / 1.0) <= 1


class Arithmetic(ByErrorFunction):
    def seen(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j


class EvenLengths(One):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x * 2 if x.shape[1] % 2 else x)


class OneAlone(One):
    """A single token is something else."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x * 2 if x.shape[1] == 1 else x)


class NeverOne(One):
    def finish(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            raise ValueError("one token")
        return self.head(x)


class ScoresOfItsOwn(Style):
    """A softmax to a power is none that is known."""

    def weights(self, scores: Tensor) -> Tensor:
        return (scores / 2).masked_fill(future(scores.shape[-1]), -math.inf).softmax(-1).square()


class RoundedWeights(Style):
    """Attention's weights in a coarser type than its queries."""

    def weights(self, scores: Tensor) -> Tensor:
        return super().weights(scores.bfloat16()).float()


class CoarseAttention(One):
    """Queries, keys and values in a coarser type than every weight."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        q, k, v = (x.to(torch.float16) for x in (q, k, v))
        return super().attend(q, k, v, layer).float()


class Centred(One):
    """A convolution that reads the next token."""

    def setup(self) -> None:
        self.near = nn.Conv1d(DIM, DIM, 3, groups=DIM)

    def padded(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x, (1, 1))

    def start(self, ids: Tensor) -> Tensor:
        x = super().start(ids)
        return x + self.near(self.padded(x.transpose(1, 2))).transpose(1, 2)


class Before(Centred):
    def padded(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x, (2, 0))


class PickedAlone(One):
    """As many rows as the tokens' content asks for, put in order."""

    def finish(self, x: Tensor) -> Tensor:
        picked = x[x[..., 0] > 0]
        return self.head(x + picked.sum() * 0 + picked[:1].mean())


class ChosenRows(One):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(torch.where(x[..., :1] > 0, x * 2, x))


def in_two(model: nn.Module) -> nn.Module:
    """Parameters that are a subclass of tensors."""
    weight = model.head.weight.detach()
    model.head.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)  # type: ignore[no-untyped-call, union-attr, assignment]
    return model


class Quantized(One):
    def eval(self) -> Quantized:
        in_two(self)
        return self


def plain(model: nn.Module) -> nn.Module:
    assert isinstance(model, Quantized) and isinstance(model.head.weight, TwoTensor)
    model.head.weight = nn.Parameter(model.head.weight.a)
    return model


class Strided(Centred):
    """A convolution that gives a value for every second token, which both of them take."""

    def start(self, ids: Tensor) -> Tensor:
        x = One.start(self, ids)
        y = nn.functional.pad(x.transpose(1, 2), (2, 0))
        near = nn.functional.conv1d(y, self.near.weight, self.near.bias, stride=2, groups=DIM)
        return x + near.repeat_interleave(2, -1)[..., : x.shape[1]].transpose(1, 2)


class MeanOfTheText(One):
    """A mixer that is no attention."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x + x.mean(1, keepdim=True))


WAYS: tuple[Way, ...] = (
    Way(Experts, "with treespec.grouped_linear", becomes(SortedExperts)),
    Way(
        OneMemory,
        "give each buffer its own memory",
        becomes(TwoMemories),
        example=with_steps,
        then=with_steps,
    ),
    Way(ByErrorFunction, "arithmetic, comparisons, torch.where", becomes(Arithmetic)),
    Way(EvenLengths, "make the forward pass the same for every number of tokens", becomes(One)),
    Way(OneAlone, "make the forward pass the same for every number of tokens", becomes(One)),
    Way(NeverOne, "make the forward pass take 1 tokens, or remove the branch", becomes(One)),
    Way(ScoresOfItsOwn, "use torch.nn.functional.scaled_dot_product_attention", becomes(One)),
    Way(RoundedWeights, "compute attention in one type", becomes(Style)),
    Way(CoarseAttention, "leave q, k and v as they are", becomes(One)),
    Way(Centred, "pad 2 zeros in front of the tokens", becomes(Before)),
    Way(PickedAlone, "choose with torch.where", becomes(ChosenRows)),
    Way(Quantized, "convert the model before it is quantized", plain),
    Way(Strided, "keep a value of every token, stride 1", becomes(Before)),
    Way(MeanOfTheText, "only attention may move information between tokens", becomes(One)),
)
