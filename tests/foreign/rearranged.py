"""Small decoders written with einops and einx. Each returns [1, T, V] logits of token ids [1, T]."""

from __future__ import annotations

import math

import torch
from decoders import Style, future
from einops import einsum, rearrange, reduce, repeat
from einops.layers.torch import Rearrange
from modules import DIM, HEADS
from torch import Tensor, nn


class Rearranged(Style):
    """rearrange, repeat and reduce everywhere, a mask from rearranged positions (lucidrains' style)."""

    def setup(self) -> None:
        self.to_qkv, self.merge = nn.Linear(DIM, 3 * DIM, bias=False), Rearrange("b h n d -> b n (h d)")

    def block(self, x: Tensor, layer: int) -> Tensor:
        q, k, v = rearrange(self.to_qkv(x), "b n (c h d) -> c b h n d", c=3, h=HEADS)
        place = torch.arange(x.shape[1])
        later = rearrange(place, "i -> i 1") < rearrange(place, "j -> 1 j")
        scores = q @ rearrange(k, "b h n d -> b h d n") / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(repeat(later, "i j -> h i j", h=HEADS), -math.inf)
        norm = reduce(x * x, "b n d -> b n 1", "mean")
        return x + self.merge(scores.softmax(-1) @ v) / (norm + 1).sqrt()


class EinsumOfEinops(Style):
    """einops.einsum with names, and groups of heads that share keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        q = rearrange(q, "b (g r) n d -> b g r n d", r=2)
        k, v = k[:, ::2], v[:, ::2]
        scores = einsum(q, k, "b g r query d, b g key d -> b g r query key") * 0.5
        w = scores.masked_fill(future(q.shape[-2]), -math.inf).softmax(-1)
        out = einsum(w, v, "b g r query key, b g key d -> b g r query d")
        return rearrange(out, "b g r n d -> b (g r) n d")


class ReducedOverTokens(Style):
    """A mean over the tokens, by name."""

    def start(self, ids: Tensor) -> Tensor:
        x = super().start(ids)
        return x + reduce(x, "b n d -> b 1 d", "mean")
