"""Small decoders with something in front of the text, behind it, or around pieces of it. [1, T, V] of ids [1, T]."""

from __future__ import annotations

import math
from typing import Any

import torch
from decoders import HEAD, Style, future
from modules import DIM, HEADS
from torch import Tensor, nn
from torch.nn import functional as F


class PrefixEmbeddings(Style):
    """Learned embeddings in front of the text, cut off before the head (a soft prompt)."""

    front = 3

    def setup(self) -> None:
        self.prompt = nn.Parameter(torch.randn(1, self.front, DIM))

    def start(self, ids: Tensor) -> Tensor:
        return torch.cat([self.prompt.expand(ids.shape[0], -1, -1), super().start(ids)], 1)

    def finish(self, x: Tensor) -> Any:
        return super().finish(x[:, self.front :])


class PrefixHasPositions(PrefixEmbeddings):
    """The places of the text begin behind it."""

    def start(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.prompt, self.embed(ids)], 1)
        return x + self.wpe(torch.arange(x.shape[1]))


class PrefixOfEmbedding(PrefixEmbeddings):
    """Out of an embedding of places (PEFT)."""

    def setup(self) -> None:
        self.prompt_table = nn.Embedding(4, DIM)

    def start(self, ids: Tensor) -> Tensor:
        front = self.prompt_table(torch.arange(4)).unsqueeze(0).expand(ids.shape[0], -1, -1)
        return torch.cat((front, Style.start(self, ids)), dim=1)

    def finish(self, x: Tensor) -> Any:
        return Style.finish(self, x[:, 4:])


class BeginningOfText(Style):
    """A token in front of the text; its row of logits goes."""

    def start(self, ids: Tensor) -> Tensor:
        return super().start(F.pad(ids, (1, 0), value=1))

    def finish(self, x: Tensor) -> Any:
        return super().finish(x)[:, 1:]


class BeginningOfTextJoined(BeginningOfText):
    def start(self, ids: Tensor) -> Tensor:
        return Style.start(self, torch.cat([torch.full((ids.shape[0], 1), 2, dtype=ids.dtype), ids], 1))


class MemoryTokens(PrefixEmbeddings):
    """is_causal is written out as a mask, over memory and text."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class MemoryTokensSpread(PrefixEmbeddings):
    """Memory sees itself whole (a prefix that is not causal)."""

    def weights(self, scores: Tensor) -> Tensor:
        later = future(scores.shape[-1]) & (torch.arange(scores.shape[-1]) >= self.front)
        return (scores / math.sqrt(HEAD)).masked_fill(later, -math.inf).softmax(-1)


class PrefixKeys(Style):
    """Learned keys and values of each layer in front (prefix tuning), [layers, 2, heads, n, D]."""

    def setup(self) -> None:
        self.past = nn.Parameter(torch.randn(self.layers, 2, HEADS, 3, HEAD))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        k, v = (torch.cat([p[None], x], 2) for p, x in zip(self.past[layer], (k, v), strict=True))
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, seen)


class PrefixKeysTokensFirst(PrefixKeys):
    """[1, T, heads, D], by einsum."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (torch.cat([p.transpose(0, 1)[None], x], 1) for p, x in zip(self.past[layer], (k, v), strict=True))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(HEAD)
        t, s = q.shape[1], k.shape[1]
        scores = scores + torch.full((t, s), -math.inf).triu(s - t + 1)
        return torch.einsum("bhqk,bkhd->bhqd", scores.softmax(-1), v)


class PrefixKeysFolded(PrefixKeys):
    """[heads, T, D]: heads folded into the batch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        k, v = (torch.cat([p, x], 1) for p, x in zip(self.past[layer], (k, v), strict=True))
        hidden = F.pad(future(q.shape[1]), (3, 0), value=False)
        scores = torch.bmm(q, k.transpose(1, 2)).masked_fill(hidden, -1e9)
        return torch.bmm(scores.softmax(-1), v).unflatten(0, (1, HEADS))


class PrefixOfProjections(Style):
    """Memory that each layer projects to keys and values itself, in front of the text's."""

    def setup(self) -> None:
        self.memory = nn.Parameter(torch.randn(1, 4, DIM))

    def block(self, x: Tensor, layer: int) -> Tensor:
        y = self.norms[layer](x)
        q = self.split(self.qkv[layer](y)[..., :DIM])
        k, v = (self.split(p) for p in self.qkv[layer](torch.cat([self.memory, y], 1))[..., DIM:].chunk(2, -1))
        seen = F.pad(~future(x.shape[1]), (4, 0), value=True)
        return x + self.out[layer](self.join(F.scaled_dot_product_attention(q, k, v, seen)))


class PaddedToAMultiple(Style):
    """The text is filled up to a multiple of 8 with token 0, and cut again."""

    def forward(self, ids: Tensor) -> Any:
        t = ids.shape[1]
        ids = F.pad(ids, (0, -t % 8))
        return super().forward(ids)[:, :t]


class PaddedInAttention(Style):
    """Queries, keys and values are filled up to a multiple of 8."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        t = q.shape[2]
        more = (8 - t % 8) % 8
        q, k, v = (F.pad(x, (0, 0, 0, more)) for x in (q, k, v))
        return super().attend(q, k, v, layer)[:, :, :t]


class PaddedHidden(Style):
    """Hidden states are filled up with zeros before the layers."""

    rest = 0

    def start(self, ids: Tensor) -> Tensor:
        x = super().start(ids)
        self.rest = math.ceil(x.shape[1] / 8) * 8 - x.shape[1]
        return torch.cat([x, x.new_zeros(1, self.rest, DIM)], 1)

    def forward(self, ids: Tensor) -> Any:
        return super().forward(ids)[:, : ids.shape[1]]


class CachesInLists(Style):
    """Native caches, called with none."""

    def forward(self, ids: Tensor, past: list[Any] | None = None) -> Any:
        caches: list[Any] = [None] * self.layers if past is None else past
        x, kept = self.start(ids), []
        for layer in range(self.layers):
            q, k, v = (self.split(p) for p in self.qkv[layer](self.norms[layer](x)).chunk(3, -1))
            if caches[layer] is not None:
                k, v = torch.cat([caches[layer][0], k], 2), torch.cat([caches[layer][1], v], 2)
            kept.append((k, v))
            x = x + self.out[layer](self.join(self.attend(q, k, v, layer)))
        return self.head(x), kept


class CachesInADict(Style):
    def forward(self, ids: Tensor, cache: dict[str, Any] | None = None) -> Any:
        if cache is None:
            cache = {}
        x = self.start(ids)
        for layer in range(self.layers):
            q, k, v = (self.split(p) for p in self.qkv[layer](self.norms[layer](x)).chunk(3, -1))
            if f"k{layer}" in cache:
                k, v = torch.cat([cache[f"k{layer}"], k], 2), torch.cat([cache[f"v{layer}"], v], 2)
            cache[f"k{layer}"], cache[f"v{layer}"] = k, v
            x = x + self.out[layer](self.join(self.attend(q, k, v, layer)))
        return {"logits": self.head(x), "cache": cache}


class CachesInAttributes(Style):
    def setup(self) -> None:
        self.use_cache, self.k, self.v = False, None, None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        if self.use_cache:
            k = k if self.k is None else torch.cat([self.k, k], 2)
            v = v if self.v is None else torch.cat([self.v, v], 2)
        self.k, self.v = k, v
        return super().attend(q, k, v, layer)


class WrittenCache(Style):
    """llama's: caches in a list of plain tensors, written in place from start_pos on."""

    def setup(self) -> None:
        self.cache_k = [torch.zeros(1, HEADS, 64, HEAD) for _ in range(self.layers)]
        self.cache_v = [torch.zeros(1, HEADS, 64, HEAD) for _ in range(self.layers)]

    def forward(self, ids: Tensor, start: int = 0) -> Any:
        x, t = self.start(ids), ids.shape[1]
        for layer in range(self.layers):
            q, k, v = (self.split(p) for p in self.qkv[layer](self.norms[layer](x)).chunk(3, -1))
            self.cache_k[layer][:, :, start : start + t] = k
            self.cache_v[layer][:, :, start : start + t] = v
            k, v = self.cache_k[layer][:, :, : start + t], self.cache_v[layer][:, :, : start + t]
            scores = q @ k.mT / math.sqrt(HEAD)
            if t > 1:
                scores = scores + torch.hstack([torch.zeros(t, start), torch.full((t, t), -math.inf).triu(1)])
            x = x + self.out[layer](self.join(scores.softmax(-1) @ v))
        return self.head(x)


class WrittenCacheOfBatch(WrittenCache):
    """The same in a dict, with a slice of the batch, and read back with repeated heads."""

    def setup(self) -> None:
        self.cache = {(name, i): torch.zeros(1, 64, HEADS // 2, HEAD) for name in "kv" for i in range(self.layers)}

    def forward(self, ids: Tensor, start: int = 0) -> Any:
        x, (b, t) = self.start(ids), ids.shape
        for layer in range(self.layers):
            q, k, v = (self.split(p) for p in self.qkv[layer](self.norms[layer](x)).chunk(3, -1))
            seen = []
            for name, new in (("k", k), ("v", v)):
                self.cache[name, layer][:b, start : start + t] = new[:, ::2].transpose(1, 2)
                old = self.cache[name, layer][:b, : start + t]
                seen.append(old.repeat_interleave(2, dim=2).transpose(1, 2))
            x = x + self.out[layer](self.join(self.attend(q, *seen, layer)))
        return self.head(x)


CONVERTED: tuple[type[Style], ...] = (
    PrefixEmbeddings,
    PrefixHasPositions,
    PrefixOfEmbedding,
    BeginningOfText,
    BeginningOfTextJoined,
    MemoryTokens,
    MemoryTokensSpread,
    PrefixKeys,
    PrefixKeysTokensFirst,
    PrefixKeysFolded,
    PrefixOfProjections,
    PaddedToAMultiple,
    PaddedInAttention,
    PaddedHidden,
    CachesInLists,
    CachesInADict,
    CachesInAttributes,
    WrittenCache,
    WrittenCacheOfBatch,
)


class MemorySeesTheText(PrefixEmbeddings):
    """Rows in front that see the text are no constants."""

    def weights(self, scores: Tensor) -> Tensor:
        later = future(scores.shape[-1]) & (torch.arange(scores.shape[-1])[:, None] >= self.front)
        return (scores / math.sqrt(HEAD)).masked_fill(later, -math.inf).softmax(-1)


class MixedWithTheMemory(PrefixEmbeddings):
    """A mean over memory and text."""

    def finish(self, x: Tensor) -> Any:
        return super().finish(x + x.mean(1, keepdim=True))


class PaddingIsSeen(PaddedHidden):
    """What fills the text up is no text, but every token sees it."""

    def weights(self, scores: Tensor) -> Tensor:
        t = scores.shape[-1]
        later = future(t) & (torch.arange(t) < t - self.rest)
        return (scores / math.sqrt(HEAD)).masked_fill(later, -math.inf).softmax(-1)


class PaddedInFront(Style):
    """The text is filled up in front: its positions depend on its length."""

    def forward(self, ids: Tensor) -> Any:
        t = ids.shape[1]
        return super().forward(F.pad(ids, (-t % 8, 0)))[:, -t:]


class CountsInAList(Style):
    """What is written to a list is no K/V cache."""

    def setup(self) -> None:
        self.counts = [torch.zeros(DIM)]

    def start(self, ids: Tensor) -> Tensor:
        self.counts[0] += 1
        return super().start(ids) + self.counts[0]


class MemoryHidden(PrefixEmbeddings):
    """Rows in front that no token sees."""

    def weights(self, scores: Tensor) -> Tensor:
        steps = torch.arange(scores.shape[-1])
        hidden = future(scores.shape[-1]) | ((steps < self.front) & (steps[:, None] >= self.front))
        return (scores / math.sqrt(HEAD)).masked_fill(hidden, -math.inf).softmax(-1)


REFUSED: tuple[type[Style], ...] = (
    CountsInAList,
    MemorySeesTheText,
    MixedWithTheMemory,
    MemoryHidden,
    PaddingIsSeen,
    PaddedInFront,
)
