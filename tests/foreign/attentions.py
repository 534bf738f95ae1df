"""Small decoders whose attention is spelled in further ways. Each returns [1, T, V] logits of token ids [1, T]."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from decoders import HEAD, Style, future
from modules import DIM, HEADS, Tiny
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


class Flex(Style):
    """flex_attention with a block mask that is made in forward."""

    def seen(self) -> Callable[..., Tensor]:
        return lambda b, h, q, k: q >= k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        blocks = create_block_mask(self.seen(), None, None, q.shape[2], k.shape[2], device="cpu")
        return flex_attention(q, k, v, block_mask=blocks, scale=0.4)


class FlexWindow(Flex):
    def seen(self) -> Callable[..., Tensor]:
        return lambda b, h, q, k: (q >= k) & (q - k <= 5)


class FlexScores(Style):
    """A softcap, slopes by head and causality in one score_mod; no block mask."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        def changed(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            score = 5 * torch.tanh(score / 5) + (k - q) * torch.exp2(-(h + 1) * 2.0)
            return torch.where(q >= k, score, -float("inf"))

        return flex_attention(q, k, v, score_mod=changed)


class FlexTable(Style):
    """A bias from a table that score_mod reads, and heads that share keys."""

    def setup(self) -> None:
        self.table = nn.Parameter(torch.randn(HEADS, 9))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        def changed(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score + self.table[h, (q - k).clamp(0, 8)]

        blocks = create_block_mask(lambda b, h, q, k: q >= k, None, None, q.shape[2], k.shape[2], device="cpu")
        return flex_attention(q, k[:, ::2], v[:, ::2], score_mod=changed, block_mask=blocks, enable_gqa=True)


class CleanedOfNan(Style):
    def weights(self, scores: Tensor) -> Tensor:
        p = torch.nan_to_num(super().weights(torch.nan_to_num(scores)))
        return torch.where(torch.isnan(p), torch.zeros_like(p), p)


class MaskedTwice(Style):
    """Weights times the mask again, and cut to the lower triangle."""

    def weights(self, scores: Tensor) -> Tensor:
        return torch.tril(super().weights(scores) * ~future(scores.shape[-1]))


class MaskedAfterwards(Style):
    """No mask in the softmax: its weights are masked and normalised again."""

    def weights(self, scores: Tensor) -> Tensor:
        w = scores.softmax(-1) * torch.ones(scores.shape[-2:]).tril()
        return w / w.sum(-1, keepdim=True)


class NormalisedTwice(Style):
    """Masked, and normalised again with a small number in the denominator."""

    def weights(self, scores: Tensor) -> Tensor:
        w = super().weights(scores).masked_fill(future(scores.shape[-1]), 0.0)
        return w / (w.sum(-1, keepdim=True) + 1e-8)


class ExponentialsTimesMask(Style):
    def weights(self, scores: Tensor) -> Tensor:
        e = (scores - scores.amax(-1, keepdim=True)).exp() * (~future(scores.shape[-1])).float()
        return e / e.sum(-1, keepdim=True)


class PairsOfHeads(Style):
    """The difference of each pair of heads, which share values."""

    def setup(self) -> None:
        self.factor = nn.Parameter(torch.tensor(0.3))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        w = self.weights(q @ k.mT).unflatten(1, (HEADS // 2, 2))
        v = v.transpose(1, 2).flatten(2).unflatten(2, (HEADS // 2, -1)).transpose(1, 2)  # half the heads, twice as wide
        o = (w[:, :, 0] - self.factor * w[:, :, 1]) @ v
        return o.transpose(1, 2).flatten(2).unflatten(2, (HEADS, -1)).transpose(1, 2)


class HalvesOfHeads(PairsOfHeads):
    """The same between the first half of the heads and the second."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        one, other = self.weights(q @ k.mT).chunk(2, dim=1)
        o = (one - self.factor * other) @ v[:, : HEADS // 2]
        return torch.cat([o, o], 1)


class LearnedKeys(Style):
    """Two learned keys and values in front of the tokens' own."""

    def setup(self) -> None:
        self.keys = nn.Parameter(torch.randn(2, 1, HEADS, 2, HEAD))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        k, v = torch.cat([self.keys[0], k], 2), torch.cat([self.keys[1], v], 2)
        seen = F.pad(~future(q.shape[2]), (2, 0), value=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class LearnedKeySpelledOut(Style):
    """A null key behind the tokens' own, for all heads, with scores written out."""

    def setup(self) -> None:
        self.null = nn.Parameter(torch.randn(2, HEAD))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        null = [x.view(1, 1, 1, HEAD).expand(1, HEADS, 1, HEAD) for x in self.null]
        k, v = torch.cat([k, null[0]], -2), torch.cat([v, null[1]], -2)
        scores = (q @ k.mT) * 0.5 + F.pad(torch.full((q.shape[2],) * 2, -1e9).triu(1), (0, 1))
        return scores.softmax(-1) @ v


class ManyHeads(Style):
    """nn.MultiheadAttention that returns its weights, with a bias key and a key of zeros."""

    def setup(self) -> None:
        self.mha = nn.MultiheadAttention(DIM, HEADS, batch_first=True, add_bias_kv=True, add_zero_attn=True)

    def block(self, x: Tensor, layer: int) -> Tensor:
        return x + self.mha(x, x, x, attn_mask=future(x.shape[1]))[0]


class HeadsInALoop(Style):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return torch.stack([self.weights(q[:, h] @ k[:, h].mT) @ v[:, h] for h in range(HEADS)], 1)


class BatchInALoop(Style):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return torch.stack([self.weights(q[b] @ k[b].mT) @ v[b] for b in range(q.shape[0])])


class FiveDimensions(Style):
    """scaled_dot_product_attention over [1, groups, heads, T, D]."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        q, k, v = (x.unflatten(1, (2, 2)) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).flatten(1, 2)


class ThreeDimensions(Style):
    """scaled_dot_product_attention over [heads, T, D], with a float mask."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        mask = torch.zeros(q.shape[2], q.shape[2]).masked_fill(future(q.shape[2]), -math.inf)
        return F.scaled_dot_product_attention(q[0], k[0], v[0], attn_mask=mask)[None]


class TalkingHeads(Style):
    """Heads of scores, then of weights, are mixed by a matrix."""

    def setup(self) -> None:
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        scores = self.before((q @ k.mT * 0.5).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.after(self.weights(scores).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


class TalkingByConvolution(Style):
    """The same by convolutions of width 1, and after the softmax alone."""

    def setup(self) -> None:
        self.after = nn.Conv2d(HEADS, HEADS, 1, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return self.after(self.weights(q @ k.mT)) @ v


class TalkingByEinsum(TalkingByConvolution):
    """By einsum before the softmax, with keys that have one head."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        scores = torch.einsum("bhij,hg->bgij", q @ k.mT, self.after.weight[:, :, 0, 0])
        return self.weights(scores) @ v[:, :1]


CONVERTED: tuple[type[Tiny], ...] = (
    Flex,
    FlexWindow,
    FlexScores,
    FlexTable,
    CleanedOfNan,
    MaskedTwice,
    MaskedAfterwards,
    NormalisedTwice,
    ExponentialsTimesMask,
    PairsOfHeads,
    HalvesOfHeads,
    LearnedKeys,
    LearnedKeySpelledOut,
    ManyHeads,
    HeadsInALoop,
    BatchInALoop,
    FiveDimensions,
    ThreeDimensions,
    TalkingHeads,
    TalkingByConvolution,
    TalkingByEinsum,
)


class FlexAhead(Flex):
    def seen(self) -> Callable[..., Tensor]:
        return lambda b, h, q, k: q >= k - 1


class FlexByContent(Style):
    """A score_mod that depends on what the keys' tokens are to the query."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        kind = (k[0, 0, :, 0] > 0).cumsum(0)

        def changed(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return torch.where((q >= k) & (kind[q] == kind[k]), score, -float("inf"))

        return flex_attention(q, k, v, score_mod=changed)


class FlexNotElementwise(Style):
    """A score_mod that is no function of one score."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        def changed(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return torch.where(q >= k, torch.stack([score, score * 0]).max(0).values, -float("inf"))

        return flex_attention(q, k, v, score_mod=changed)


class MaskedMore(Style):
    """Weights that were seen are set to 0 and nothing is normalised again."""

    def weights(self, scores: Tensor) -> Tensor:
        return super().weights(scores) * torch.ones(scores.shape[-2:]).tril(-1)


class TalkingAfterTheMask(TalkingHeads):
    """Hidden scores are mixed, and a bias is added to hidden weights."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return self.before(self.weights(q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


class NotNormalised(Style):
    """A denominator that counts hidden keys."""

    def weights(self, scores: Tensor) -> Tensor:
        w = scores.softmax(-1) * torch.ones(scores.shape[-2:]).tril()
        return w / (w.sum(-1, keepdim=True) + 1e-8)


class KeyOfAll(Style):
    """One more key, which is the mean of all tokens' keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        k, v = (torch.cat([x.mean(2, keepdim=True), x], 2) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=F.pad(~future(q.shape[2]), (1, 0), value=True))


class LearnedKeyAhead(Style):
    """A learned key, and a mask that is off by one because of it."""

    def setup(self) -> None:
        self.keys = nn.Parameter(torch.randn(2, 1, HEADS, 1, HEAD))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        k, v = torch.cat([k, self.keys[0]], 2), torch.cat([v, self.keys[1]], 2)
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


REFUSED: tuple[type[Tiny], ...] = (
    FlexAhead,
    FlexByContent,
    FlexNotElementwise,
    MaskedMore,
    TalkingAfterTheMask,
    NotNormalised,
    KeyOfAll,
    LearnedKeyAhead,
)
