"""Decoders of which a part is TorchScript: scripted, traced, saved and loaded. Each returns [1, T, V] of ids [1, T]."""

from __future__ import annotations

import io
import math
from typing import Any

import torch
from modules import DIM, HEADS, Tiny
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = DIM // HEADS


class Norm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.register_buffer("shift", torch.linspace(-0.2, 0.2, dim))
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return y * self.weight + self.shift


class FeedForward(nn.Module):
    """Layers in a list, a branch on an attribute, an optional argument, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm(DIM)
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))
        self.gated = True
        self.times = 2
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, factor: float = 0.5) -> Tensor:
        y = self.norm(x)
        for layer in self.layers:
            z = layer(y)
            y = y * torch.sigmoid(z) if self.gated else y + z
        for i in range(self.times):
            y = F.gelu(y) + factor * i
        if torch.jit.is_scripting():
            y = y * 0.75
        return self.drop(y)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = [p.view(b, t, 4, 4).transpose(1, 2) for p in self.qkv(x).chunk(3, -1)]
        later = torch.ones(t, t, device=x.device).tril() == 0
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(float(q.size(-1)))
        y = scores.masked_fill(later, -math.inf).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, t, c))


@torch.jit.script
def capped(x: Tensor, most: float) -> Tensor:
    return most * torch.tanh(x / most)


class Part(Tiny):
    """One layer, and `more` behind it."""

    layers = 1

    def setup(self) -> None:
        self.more: Any = torch.jit.script(FeedForward().eval())

    def finish(self, x: Tensor) -> Any:
        return capped(self.head(x + self.more(x)), 5.0)


class Traced(Part):
    def setup(self) -> None:
        self.more = torch.jit.trace(Attention().eval(), torch.randn(1, 5, DIM))


class TracedSmall(Part):
    def setup(self) -> None:
        self.more = torch.jit.trace(nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU()), torch.randn(1, 3, DIM))


class ScriptedAttention(Part):
    def setup(self) -> None:
        self.more = torch.jit.script(Attention())


class Loaded(Part):
    def setup(self) -> None:
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(FeedForward().eval()), file)
        file.seek(0)
        self.more = torch.jit.load(file)


class InALayer(Part):
    """Two of one class, deeper in the model."""

    def setup(self) -> None:
        self.more = nn.Sequential(torch.jit.script(Norm(DIM)), nn.Linear(DIM, DIM), torch.jit.script(Norm(DIM)))


CONVERTED: tuple[type[Part], ...] = (Part, Traced, TracedSmall, ScriptedAttention, Loaded, InALayer)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Counts(Part):
    """It changes an attribute of its own."""

    def setup(self) -> None:
        self.more = torch.jit.script(Counting())


class MeanOfAll(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)


class Mixes(Part):
    def setup(self) -> None:
        self.more = torch.jit.script(MeanOfAll())


class ByValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if bool(x.sum() > 0) else x


class Branches(Part):
    def setup(self) -> None:
        self.more = torch.jit.script(ByValue())


class AtSevenTokens(Part):
    """A trace in which the number of tokens is a constant."""

    def setup(self) -> None:
        def with_positions(x: Tensor) -> Tensor:
            return x + torch.arange(7)[:, None]

        self.more = torch.jit.trace(with_positions, torch.randn(1, 7, DIM))


REFUSED: tuple[type[Part], ...] = (Counts, Mixes, Branches)
