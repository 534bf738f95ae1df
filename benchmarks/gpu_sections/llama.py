"""A Llama as plain torch: its shapes are the published ones, its weights random. Needs no transformers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool = False
    theta: float = 5e5

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SHAPES = {
    "1B": Sizes(2048, 16, 32, 8, 8192, 128256, tied=True),
    "8B": Sizes(4096, 32, 32, 8, 14336, 128256),
    "tiny": Sizes(64, 2, 4, 2, 96, 97),
}


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


class Block(nn.Module):
    def __init__(self, shape: Sizes) -> None:
        super().__init__()
        self.shape = shape
        kv = shape.kv_heads * shape.head_dim
        self.norm, self.mlp_norm = RMSNorm(shape.hidden), RMSNorm(shape.hidden)
        self.q, self.o = (nn.Linear(shape.hidden, shape.hidden, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(shape.hidden, kv, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(shape.hidden, shape.intermediate, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        y = self.norm(x)
        q, k, v = (  # [B, T, C] -> [B, H, T, D]
            p(y).view(batch, tokens, -1, self.shape.head_dim).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        q, k = (z * cos + rotate_half(z) * sin for z in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(out.transpose(1, 2).reshape(batch, tokens, -1))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self, shape: Sizes) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        if shape.tied:
            self.head.weight = self.embed.weight
        frequencies = shape.theta ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)
        angles = positions[:, None].float() * self.frequencies.float()
        angles = torch.cat([angles, angles], -1)  # [T, D]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def make(name: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Llama:
    """Random weights, made on the device."""
    with torch.device("meta"):
        model = Llama(SHAPES[name])
    model = model.to(dtype).to_empty(device=device)
    shape = SHAPES[name]
    if shape.tied:
        model.head.weight = model.embed.weight  # to_empty made two of it
    steps = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
    model.frequencies = (shape.theta**-steps).float()
    random = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=random)
            else:
                parameter.fill_(1)
    return model.eval()


def weight_bytes(model: Llama) -> int:
    """Bytes of weights that one step reads: all but the table of which it reads a few rows."""
    read = sum(p.numel() * p.element_size() for p in model.parameters())
    table = model.embed.weight
    return read if model.shape.tied else read - table.numel() * table.element_size()
