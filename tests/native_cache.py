"""Decoders that keep a K/V cache of their own in buffers, and are called with `input_pos`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, WIDTH, HEADS, KV_HEADS, CELLS = 29, 32, 4, 2, 48


class Cache(nn.Module):
    """Keys and values of one layer, [1, H, cells, D], written at the positions of the new tokens."""

    def __init__(self) -> None:
        super().__init__()
        shape = (1, KV_HEADS, CELLS, WIDTH // HEADS)
        self.register_buffer("k_cache", torch.zeros(shape), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape), persistent=False)

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k_cache[:, :, input_pos] = k
        self.v_cache[:, :, input_pos] = v
        return self.k_cache, self.v_cache


class Attention(nn.Module):
    """Fused QKV, grouped heads, rope on interleaved pairs, a cache; `read` may be overridden."""

    cache: type[Cache] = Cache

    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(WIDTH, WIDTH + 2 * KV_HEADS * WIDTH // HEADS, bias=False)
        self.wo = nn.Linear(WIDTH, WIDTH, bias=False)
        self.kv_cache = self.cache()

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None, input_pos: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        side = KV_HEADS * WIDTH // HEADS
        q, k, v = self.wqkv(x).split([WIDTH, side, side], dim=-1)
        q = rotate(q.view(batch, tokens, HEADS, -1), rope).transpose(1, 2)
        k = rotate(k.view(batch, tokens, KV_HEADS, -1), rope).transpose(1, 2)
        v = v.view(batch, tokens, KV_HEADS, -1).transpose(1, 2)
        k, v = self.kv_cache.update(input_pos, k, v)
        y = self.read(q, k, v, mask)
        return self.wo(y.transpose(1, 2).contiguous().view(batch, tokens, WIDTH))

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        k, v = (a.repeat_interleave(HEADS // KV_HEADS, dim=1) for a in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """x [B, T, H, D], rope [T, D / 2, 2]: pairs (2i, 2i + 1) are turned."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    rope = rope.view(1, pairs.shape[1], 1, pairs.shape[3], 2)
    turned = torch.stack(
        [
            pairs[..., 0] * rope[..., 0] - pairs[..., 1] * rope[..., 1],
            pairs[..., 1] * rope[..., 0] + pairs[..., 0] * rope[..., 1],
        ],
        -1,
    )
    return turned.flatten(3).type_as(x)


class Block(nn.Module):
    def __init__(self, attention: type[Attention]) -> None:
        super().__init__()
        self.attention = attention()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.w1, self.w3 = nn.Linear(WIDTH, 48, bias=False), nn.Linear(WIDTH, 48, bias=False)
        self.w2 = nn.Linear(48, WIDTH, bias=False)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None, input_pos: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), rope, mask, input_pos)
        y = self.norm2(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class CachedDecoder(nn.Module):
    """Embedding, blocks, norm, head; rope and the causal mask are buffers read at `input_pos`."""

    attention: type[Attention] = Attention

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block(self.attention) for _ in range(layers))
        self.norm = nn.RMSNorm(WIDTH)
        self.output = nn.Linear(WIDTH, VOCAB, bias=False)
        dim = WIDTH // HEADS
        angle = torch.arange(CELLS)[:, None] / 100.0 ** (torch.arange(0, dim, 2) / dim)
        self.register_buffer("freqs_cis", torch.stack([angle.cos(), angle.sin()], -1), persistent=False)
        self.register_buffer("causal_mask", self.make_mask(), persistent=False)
        self.eval()

    def make_mask(self) -> Tensor:
        return torch.tril(torch.ones(CELLS, CELLS, dtype=torch.bool))

    def mask(self, input_pos: Tensor) -> Tensor | None:
        return self.causal_mask[None, None, input_pos]  # [1, 1, T, cells]

    def forward(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        mask, rope = self.mask(input_pos), self.freqs_cis[input_pos]
        x = self.tok_embeddings(idx)
        for layer in self.layers:
            x = layer(x, rope, mask, input_pos)
        return self.output(self.norm(x))


class EagerScores(Attention):
    """The same attention as matmul, softmax, matmul."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        k, v = (
            a[:, :, None].expand(-1, -1, HEADS // KV_HEADS, -1, -1).reshape(1, HEADS, CELLS, WIDTH // HEADS)
            for a in (k, v)
        )
        scores = (q @ k.transpose(-2, -1) / math.sqrt(WIDTH // HEADS)).masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ v


class WidenedKeys(Attention):
    """Cached keys go through a bottleneck of as many features as the cache has cells."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(WIDTH // HEADS, CELLS), nn.Linear(CELLS, WIDTH // HEADS)

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return super().read(q, self.narrow(F.silu(self.wide(k))), v, mask)


class CopiedCache(Cache):
    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.k_cache.index_copy_(2, input_pos, k), self.v_cache.index_copy_(2, input_pos, v)


class WrittenPartCache(Cache):
    """Only the cells that were written are read again."""

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().update(input_pos, k, v)
        return k[:, :, : input_pos.shape[0]], v[:, :, : input_pos.shape[0]]


class OuterCache(Cache):
    """Cells in dimension 1, as [1, cells, H, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.k_cache = self.k_cache.transpose(1, 2).contiguous()
        self.v_cache = self.v_cache.transpose(1, 2).contiguous()

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k_cache[:, input_pos] = k.transpose(1, 2)
        self.v_cache[:, input_pos] = v.transpose(1, 2)
        return self.k_cache.transpose(1, 2), self.v_cache.transpose(1, 2)


class Past(nn.Module):
    """One attention; the past is an argument, and the new past is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.output = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.qkv, self.wo = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.positions = nn.Embedding(CELLS, WIDTH)
        self.eval()

    def forward(self, ids: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens = ids.shape
        before = past_k.shape[2]
        steps = torch.arange(before, before + tokens)
        x = self.embed(ids) + self.positions(steps)
        q, k, v = (a.view(batch, tokens, HEADS, -1).transpose(1, 2) for a in self.qkv(x).chunk(3, -1))
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        mask = torch.arange(before + tokens)[None, :] <= steps[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.output(x + self.wo(y.transpose(1, 2).reshape(batch, tokens, -1))), k, v


class StartCache(nn.Module):
    """Keys and values of one layer, [1, cells, H, D], written and read as slices from `start_pos`."""

    def __init__(self) -> None:
        super().__init__()
        shape = (1, CELLS, HEADS, WIDTH // HEADS)
        self.register_buffer("cache_k", torch.zeros(shape), persistent=False)
        self.register_buffer("cache_v", torch.zeros(shape), persistent=False)
        self.qkv, self.wo = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, start_pos: int, mask: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (a.view(batch, tokens, HEADS, -1) for a in self.qkv(x).chunk(3, -1))
        self.cache_k[:batch, start_pos : start_pos + tokens] = k
        self.cache_v[:batch, start_pos : start_pos + tokens] = v
        keys, values = self.cache_k[:batch, : start_pos + tokens], self.cache_v[:batch, : start_pos + tokens]
        q, keys, values = (a.transpose(1, 2) for a in (q, keys, values))
        scores = (q @ keys.transpose(2, 3) / math.sqrt(WIDTH // HEADS) + mask).float().softmax(-1).type_as(q)
        return self.wo((scores @ values).transpose(1, 2).reshape(batch, tokens, WIDTH))


class StartDecoder(nn.Module):
    """Called with `start_pos`, a number: 0 in the example."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CELLS, WIDTH)
        self.layers = nn.ModuleList(StartCache() for _ in range(2))
        self.output = nn.Linear(WIDTH, VOCAB)
        self.eval()

    def forward(self, ids: Tensor, start_pos: int) -> Tensor:
        tokens = ids.shape[1]
        mask = torch.triu(torch.full((tokens, tokens), -torch.inf), diagonal=1)
        mask = torch.hstack([torch.zeros((tokens, start_pos)), mask])
        x = self.embed(ids) + self.wpe(torch.arange(start_pos, start_pos + tokens))
        for layer in self.layers:
            x = x + layer(x, start_pos, mask)
        return self.output(x)
