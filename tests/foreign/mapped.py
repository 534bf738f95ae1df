"""Decoders that map a function over heads, tokens or experts by `torch.vmap`."""

from __future__ import annotations

import math

import torch
from decoders import HEAD, Style, future
from modules import DIM, HEADS
from torch import Tensor, nn
from torch.nn import functional as F


def one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[T, D] each."""
    scores = q @ k.T / math.sqrt(q.shape[-1])
    seen = torch.ones(scores.shape[-1], scores.shape[-1], dtype=torch.bool).tril()
    return torch.where(seen, scores, -1e9).softmax(-1) @ v


class EachHead(Style):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return torch.vmap(torch.vmap(one_head))(q, k, v)


class HeadsInTheMiddle(Style):
    """Heads are dimension 1 of what goes in and what comes out."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = torch.einsum("btd,bsd->bts", q, k) / 2
            return torch.einsum("bts,bsd->btd", scores.masked_fill(future(scores.shape[-1]), -math.inf).softmax(-1), v)

        return torch.vmap(one, in_dims=1, out_dims=1)(q, k, v)


class SlopeOfEachHead(Style):
    """A number of each head beside its queries."""

    def setup(self) -> None:
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, HEADS + 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        place = torch.arange(q.shape[2])
        away = place[:, None] - place

        def one(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
            return (q @ k.mT / 2 - self.bias(slope, away)).masked_fill(away < 0, -math.inf).softmax(-1) @ v

        return torch.vmap(one, in_dims=(1, 1, 1, 0), out_dims=1)(q, k, v, self.slopes)

    def bias(self, slope: Tensor, away: Tensor) -> Tensor:
        return slope * away


class WeightsOfEachHead(Style):
    """Each head projects for itself; keys of one head serve all."""

    def setup(self) -> None:
        self.of_queries = nn.Parameter(torch.randn(HEADS, HEAD, DIM))
        self.of_values = nn.Parameter(torch.randn(HEADS, HEAD, DIM))
        self.of_keys = nn.Linear(DIM, HEAD)

    def block(self, x: Tensor, layer: int) -> Tensor:
        y = self.norms[layer](x)
        k = self.of_keys(y)

        def one(query: Tensor, value: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(F.linear(y, query), k, F.linear(y, value), is_causal=True)

        heads = torch.vmap(one)(self.of_queries, self.of_values)
        return x + self.out[layer](heads.permute(1, 2, 0, 3).flatten(2))


class Experts(Style):
    """All experts on all tokens, and a mean of them."""

    def setup(self) -> None:
        self.up, self.down = (nn.Parameter(torch.randn(3, *s) * 0.3) for s in ((DIM, 8), (8, DIM)))
        self.gate = nn.Linear(DIM, 3)

    def finish(self, x: Tensor) -> Tensor:
        every = torch.vmap(lambda up, down: F.gelu(x @ up) @ down)(self.up, self.down)  # [3, 1, T, C]
        return self.head(x + torch.einsum("ebtc,bte->btc", every, self.gate(x).softmax(-1)))


class EachToken(Style):
    """A function of one token's row."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(torch.vmap(lambda row: row / (1 + row.abs().sum()))(x[0])[None])


class SeesAll(Style):
    """Each head sees the future."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return torch.vmap(lambda q, k, v: (q @ k.mT / 2).softmax(-1) @ v, in_dims=1, out_dims=1)(q, k, v)


class SoftmaxOverQueries(Style):
    """Of each head, along the wrong dimension."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT / 2).masked_fill(future(q.shape[1]), -1e9).softmax(1) @ v

        return torch.vmap(one, in_dims=1, out_dims=1)(q, k, v)


class SumOfColumns(Style):
    """A function of each channel mixes the tokens."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(torch.vmap(lambda column: column - column.mean(), in_dims=1, out_dims=1)(x[0])[None])


class SumOfANumber(SlopeOfEachHead):
    """A sum over no dimension, beside which a sum over none named is one over all."""

    def bias(self, slope: Tensor, away: Tensor) -> Tensor:
        return slope.sum() * away


class Sorted(Style):
    """An op without a rule."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(torch.vmap(lambda row: row.sort().values)(x[0])[None])


CONVERTED = (EachHead, HeadsInTheMiddle, SlopeOfEachHead, WeightsOfEachHead, Experts, EachToken)
REFUSED = (SumOfANumber, SeesAll, SoftmaxOverQueries, SumOfColumns, Sorted)
