"""Small models and their graphs after every pass, for the tests of the inspection tools."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from treespec_compiler.capture.call import call_spec
from treespec_compiler.options import Options
from treespec_compiler.passes.framework.instruments import Recorder
from treespec_compiler.passes.show.snapshot import Snapshot
from treespec_compiler.pipeline import convert

EAGER = {"lowering": "eager", "kernels": "aten"}


class Block(nn.Module):
    """A layer with learned positions outside and causal attention inside."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(torch.relu(self.up(x)))


class Decoder(nn.Module):
    """A decoder of a page, so that goldens do not follow a library's versions."""

    def __init__(self, layers: int = 2, dim: int = 16, heads: int = 2, vocab: int = 32, context: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.positions = nn.Embedding(context, dim)
        self.layers = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.head = nn.Linear(dim, vocab)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Windowed(Decoder):
    """As `Decoder`, with a materialized window of 8 in every layer."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        t = torch.arange(tokens.shape[1], device=tokens.device)
        gap = t[:, None] - t[None, :]
        mask = (gap >= 0) & (gap < 8)
        x = self.embed(tokens) + self.positions(t)
        for layer in self.layers:
            b, n, d = x.shape
            q, k, v = (y.view(b, n, 2, -1).transpose(1, 2) for y in layer.qkv(layer.norm(x)).chunk(3, -1))
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + layer.out(y.transpose(1, 2).reshape(b, n, d))
        return self.head(x)


class Summing(Decoder):
    """Refused: a cumulative sum mixes the tokens."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens).cumsum(1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def seeded(cls: type[nn.Module], **sizes: int) -> nn.Module:
    torch.manual_seed(0)
    return cls(**sizes).eval()


def decoder() -> nn.Module:
    return seeded(Decoder)


def windowed() -> nn.Module:
    return seeded(Windowed)


def summing() -> nn.Module:
    return seeded(Summing)


def deep() -> nn.Module:
    """32 layers."""
    return seeded(Decoder, layers=32)


@functools.cache
def graphs(factory: Any = decoder) -> dict[str, Snapshot]:
    """The graph after every pass, by the pass's name; "capture" is the first."""
    recorder = Recorder()
    model = factory()
    convert(model, call_spec(model), Options.parse(EAGER), instruments=[recorder])
    return {g.after: g for g in recorder.graphs}
