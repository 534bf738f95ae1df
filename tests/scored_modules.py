"""Decoders that are not from transformers: each changes the scores, the mask, the block or the call in its own way."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, WIDTH, HEADS, CONTEXT = 61, 32, 4, 64


class Attention(nn.Module):
    """Eager attention; `scores` may be overridden."""

    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.kv_heads, self.dim = kv_heads, WIDTH // HEADS
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * kv_heads * self.dim)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, HEADS, self.dim).transpose(1, 2)
        k, v = self.kv(x).view(b, t, 2, self.kv_heads, self.dim).permute(2, 0, 3, 1, 4)
        k, v = (y.repeat_interleave(HEADS // self.kv_heads, 1) for y in (k, v))
        w = self.scores(q, k, t).softmax(-1)
        return self.out((w @ v).transpose(1, 2).reshape(b, t, WIDTH))

    def scores(self, q: Tensor, k: Tensor, t: int) -> Tensor:
        s = q @ k.transpose(-1, -2) / math.sqrt(self.dim)
        return s.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -torch.inf)


class Alibi(Attention):
    """ALiBi by an outer difference of aranges."""

    def scores(self, q: Tensor, k: Tensor, t: int) -> Tensor:
        i = torch.arange(t)
        slopes = 2.0 ** -(torch.arange(HEADS) + 1.0)
        s = q @ k.transpose(-1, -2) * self.dim**-0.5 - slopes[:, None, None] * (i[:, None] - i[None, :])
        return s.masked_fill(i[None, :] > i[:, None], -1e9)


class Banded(Attention):
    """A band cut out of a matrix of ones with tril and triu."""

    window = 5

    def scores(self, q: Tensor, k: Tensor, t: int) -> Tensor:
        band = torch.ones(t, t).tril().triu(1 - self.window)
        return (q @ k.transpose(-1, -2) * self.dim**-0.5).masked_fill(band == 0, float("-inf"))


class Chunked(Attention):
    def scores(self, q: Tensor, k: Tensor, t: int) -> Tensor:
        i = torch.arange(t)
        seen = (i[None, :] <= i[:, None]) & (i[None, :] // 6 == i[:, None] // 6)
        return torch.where(seen, q @ k.transpose(-1, -2) * self.dim**-0.5, -torch.inf)


class Softcapped(Attention):
    """QK-norm and a softcap, with an additive mask buffer."""

    def __init__(self) -> None:
        super().__init__(kv_heads=2)
        self.q_norm, self.k_norm = nn.RMSNorm(self.dim), nn.RMSNorm(self.dim)
        self.register_buffer("hide", torch.full((CONTEXT, CONTEXT), -torch.inf).triu(1))

    def scores(self, q: Tensor, k: Tensor, t: int) -> Tensor:
        s = self.q_norm(q) @ self.k_norm(k).transpose(-1, -2) * 3
        return 4.0 * torch.tanh(s / 4.0) + self.hide[:t, :t]


class Sinks(Attention):
    """A learned column joins the softmax and is dropped; the maximum is subtracted first."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, HEADS, self.dim).transpose(1, 2)
        k, v = self.kv(x).view(b, t, 2, HEADS, self.dim).permute(2, 0, 3, 1, 4)
        s = torch.cat([self.scores(q, k, t), self.sinks.reshape(1, -1, 1, 1).expand(b, -1, t, -1)], -1)
        s = s - s.max(-1, keepdim=True).values
        w = s.softmax(-1)[..., :-1]
        return self.out((w @ v).transpose(1, 2).reshape(b, t, WIDTH))


class Bucketed(Attention):
    """Relative position bias by bucket table, as in T5: exact small distances, logarithmic large ones."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(8, HEADS)

    def scores(self, q: Tensor, k: Tensor, t: int) -> Tensor:
        i = torch.arange(t)
        distance = (i[:, None] - i[None, :]).clamp(min=0)
        large = 4 + (torch.log(distance.float().clamp(min=1) / 4) / math.log(8) * 4).long()
        bucket = torch.where(distance < 4, distance, large.clamp(max=7))
        s = q @ k.transpose(-1, -2) + self.bias(bucket).permute(2, 0, 1)
        return s.masked_fill(i[None, :] > i[:, None], -torch.inf)


class Decoder(nn.Module):
    """Two pre-norm blocks around any attention; `parallel`: attention and MLP read the same input."""

    def __init__(self, attention: Any = Attention, parallel: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.attention = nn.ModuleList(attention() for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH)) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.parallel = parallel

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for i in range(2):
            attended = self.attention[i](self.norm[2 * i](x))
            if self.parallel:
                x = x + attended + self.mlp[i](self.norm[2 * i + 1](x))
            else:
                x = x + attended
                x = x + self.mlp[i](self.norm[2 * i + 1](x))
        return self.head(x)


class InterleavedRope(nn.Module):
    """Fused QKV, rope on interleaved pairs, and positions given by the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        d = x.shape[-1]
        angle = positions[:, None, :, None].float() / 100.0 ** (torch.arange(0, d, 2) / d)
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
        return torch.stack(turned, -1).flatten(-2)

    def forward(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        b, t = ids.shape
        x = self.embed(ids)
        q, k, v = (y.view(b, t, HEADS, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        q, k = self.rotate(q, position_ids), self.rotate(k, position_ids)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.out(y.transpose(1, 2).reshape(b, t, -1)))


def built(attention: Any, **options: Any) -> nn.Module:
    """A decoder with this attention, and weights that spread its logits."""
    torch.manual_seed(0)
    model = Decoder(attention, **options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
    return model
