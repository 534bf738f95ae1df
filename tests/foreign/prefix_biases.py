"""Small decoders with a bias by distance over a text and what stands in front of it. [1, T, V] of ids [1, T]."""

from __future__ import annotations

import math

import torch
from decoders import Style, future
from modules import HEADS
from prefixes import PrefixEmbeddings, PrefixKeys
from torch import Tensor, nn
from torch.nn import functional as F

SLOPES = 2.0 ** -torch.arange(1, HEADS + 1)[:, None, None]


def alibi(queries: Tensor, keys: Tensor) -> Tensor:
    """[heads, q, k]"""
    return SLOPES * (keys - queries[:, None])


class PromptAlibi(PrefixEmbeddings):
    """ALiBi over a soft prompt and the text."""

    def weights(self, scores: Tensor) -> Tensor:
        steps = torch.arange(scores.shape[-1])
        return (scores / 2 + alibi(steps, steps)).masked_fill(future(len(steps)), -math.inf).softmax(-1)


class PromptAlibiFused(PrefixEmbeddings):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        steps = torch.arange(q.shape[2])
        bias = alibi(steps, steps).masked_fill(future(len(steps)), -math.inf)
        return F.scaled_dot_product_attention(q, k, v, bias[None])


class PromptBuckets(PrefixEmbeddings):
    """A relative bias, read at clipped distances (T5)."""

    def setup(self) -> None:
        super().setup()
        self.near = nn.Embedding(8, HEADS)

    def weights(self, scores: Tensor) -> Tensor:
        steps = torch.arange(scores.shape[-1])
        bias = self.near((steps[:, None] - steps).clamp(0, 7)).permute(2, 0, 1)
        return (scores + bias).masked_fill(future(len(steps)), -math.inf).softmax(-1)


class KeysAlibi(PrefixKeys):
    """ALiBi over learned keys and the text's; places are counted from the first learned one."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        k, v = (torch.cat([p[None], x], 2) for p, x in zip(self.past[layer], (k, v), strict=True))
        keys = torch.arange(k.shape[2])
        own = keys[k.shape[2] - q.shape[2] :]
        return self.mixed(q @ k.mT / 2, v, own, keys)

    def mixed(self, scores: Tensor, v: Tensor, own: Tensor, keys: Tensor) -> Tensor:
        scores = scores + self.bias(own, keys)
        return scores.masked_fill(keys > own[:, None], -math.inf).softmax(-1) @ v

    def bias(self, own: Tensor, keys: Tensor) -> Tensor:
        return alibi(own, keys)


class KeysAlibiFused(KeysAlibi):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        k, v = (torch.cat([p[None], x], 2) for p, x in zip(self.past[layer], (k, v), strict=True))
        keys = torch.arange(k.shape[2])
        own = torch.arange(3, 3 + q.shape[2])
        bias = alibi(own, keys).masked_fill(keys > own[:, None], -math.inf)
        return F.scaled_dot_product_attention(q, k, v, bias[None])


class KeysBuckets(KeysAlibi):
    def setup(self) -> None:
        super().setup()
        self.near = nn.Embedding(8, HEADS)

    def bias(self, own: Tensor, keys: Tensor) -> Tensor:
        return self.near((own[:, None] - keys).clamp(0, 7)).permute(2, 0, 1)


CONVERTED: tuple[type[Style], ...] = (
    PromptAlibi,
    PromptAlibiFused,
    PromptBuckets,
    KeysAlibi,
    KeysAlibiFused,
    KeysBuckets,
)


class PromptBiasOfTheLength(PromptAlibi):
    """Distances in lengths of the text."""

    def weights(self, scores: Tensor) -> Tensor:
        steps = torch.arange(scores.shape[-1])
        bias = alibi(steps, steps) / len(steps)
        return (scores / 2 + bias).masked_fill(future(len(steps)), -math.inf).softmax(-1)


class PromptBringsBack(PromptAlibi):
    """More is added to what comes later than the mask takes away."""

    def weights(self, scores: Tensor) -> Tensor:
        steps = torch.arange(scores.shape[-1])
        scores = (scores / 2).masked_fill(future(len(steps)), -1e5)
        return (scores + 1e5 * torch.sign(steps - steps[:, None]).clamp(min=0)).softmax(-1)


class KeysBiasOfTheLength(KeysAlibi):
    def bias(self, own: Tensor, keys: Tensor) -> Tensor:
        return alibi(own, keys) + (keys < 3) * len(own)


class KeysOutOfSight(KeysAlibi):
    """Learned keys leave a window: the last queries see none of them."""

    def bias(self, own: Tensor, keys: Tensor) -> Tensor:
        far = own[:, None] - keys > 6
        return alibi(own, keys).masked_fill(far, -math.inf)


REFUSED: tuple[type[Style], ...] = (PromptBiasOfTheLength, PromptBringsBack, KeysBiasOfTheLength, KeysOutOfSight)
