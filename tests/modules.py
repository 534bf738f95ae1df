"""Plain nn.Module decoders, written for these tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

VOCAB, DIM, HEADS, CONTEXT = 23, 16, 4, 64


class Tiny(nn.Module):
    """A decoder of two layers whose parts are methods: a variant overrides one of them."""

    layers = 2

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.wpe = nn.Embedding(CONTEXT, DIM)
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(self.layers))
        self.qkv = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(self.layers))
        self.out = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(self.layers))
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        self.setup()
        self.eval()

    def setup(self) -> None:
        """More parameters and buffers of a variant."""

    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(torch.arange(ids.shape[1], device=ids.device))  # [T, C]

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)  # [B, T, C] -> [B, H, T, D]

    def join(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)  # [B, H, T, D] -> [B, T, C]

    def mask(self, tokens: int) -> Tensor | None:
        """What attention is given besides q, k, v; None: is_causal."""
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        mask = self.mask(q.shape[2])
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

    def block(self, x: Tensor, layer: int) -> Tensor:
        q, k, v = (self.split(part) for part in self.qkv[layer](self.norms[layer](x)).chunk(3, -1))
        return x + self.out[layer](self.join(self.attend(q, k, v, layer)))

    def start(self, ids: Tensor) -> Tensor:
        return self.embed(ids) + self.positions(ids)

    def finish(self, x: Tensor) -> Any:
        return self.head(x)

    def forward(self, ids: Tensor) -> Any:
        x = self.start(ids)
        for layer in range(self.layers):
            x = self.block(x, layer)
        return self.finish(x)


class NanoGPT(nn.Module):
    """Learned positions read by `arange`, pre-norm blocks with a GELU MLP, tied head, `is_causal`."""

    def __init__(self, layers: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, DIM)
        self.wpe = nn.Embedding(CONTEXT, DIM)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_NanoBlock(dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        tokens = ids.shape[1]
        assert tokens <= CONTEXT, f"at most {CONTEXT} tokens"
        x = self.drop(self.wte(ids) + self.wpe(torch.arange(tokens, device=ids.device)))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits, None
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class _NanoBlock(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(dim, dim=2)
        q, k, v = (a.view(batch, tokens, HEADS, dim // HEADS).transpose(1, 2) for a in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        y = scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).contiguous().view(batch, tokens, dim))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class RopeTril(nn.Module):
    """Rope from tables that are sliced `[:T]`, grouped heads, a `tril` buffer for a mask, RMS norm, gated MLP."""

    def __init__(self, layers: int = 2, kv_heads: int = 2, theta: float = 1e4) -> None:
        super().__init__()
        dim = DIM // HEADS
        self.kv_heads = kv_heads
        self.embed = nn.Embedding(VOCAB, DIM)
        steps = torch.arange(CONTEXT)[:, None] / theta ** (torch.arange(0, dim, 2) / dim)  # [context, D / 2]
        self.register_buffer("cos", steps.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", steps.sin().repeat(1, 2), persistent=False)
        self.register_buffer("seen", torch.tril(torch.ones(CONTEXT, CONTEXT)).bool(), persistent=False)
        self.q = nn.ModuleList(nn.Linear(DIM, DIM, bias=False) for _ in range(layers))
        self.kv = nn.ModuleList(nn.Linear(DIM, 2 * kv_heads * dim, bias=False) for _ in range(layers))
        self.o = nn.ModuleList(nn.Linear(DIM, DIM, bias=False) for _ in range(layers))
        self.gate = nn.ModuleList(nn.Linear(DIM, 2 * DIM, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(DIM, 2 * DIM, bias=False) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(2 * DIM, DIM, bias=False) for _ in range(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(DIM) for _ in range(2 * layers + 1))
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        tokens = ids.shape[1]
        cos, sin, seen = self.cos[:tokens], self.sin[:tokens], self.seen[:tokens, :tokens]
        x = self.embed(ids)
        for i in range(len(self.q)):
            y = self.norms[2 * i](x)
            q = _heads(self.q[i](y), HEADS)
            k, v = (_heads(a, self.kv_heads) for a in self.kv[i](y).chunk(2, -1))
            y = scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, seen, enable_gqa=True)
            x = x + self.o[i](y.transpose(1, 2).flatten(2))
            y = self.norms[2 * i + 1](x)
            x = x + self.down[i](nn.functional.silu(self.gate[i](y)) * self.up[i](y))
        return self.head(self.norms[-1](x))


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, T, C] -> [B, H, T, D]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin
