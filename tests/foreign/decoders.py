"""Small decoders in the styles that people write attention in. Each returns [1, T, V] logits of token ids [1, T]."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from modules import DIM, HEADS, VOCAB, Tiny
from torch import Tensor, nn
from torch.nn import functional as F

HEAD = DIM // HEADS


def future(tokens: int) -> Tensor:
    """True where the key comes after the query."""
    return torch.ones(tokens, tokens, dtype=torch.bool).triu(1)


class Style(Tiny):
    """Attention with scores of its own spelling; q, k, v are [1, H, T, D]."""

    layers = 1

    def weights(self, scores: Tensor) -> Tensor:
        return (scores / math.sqrt(HEAD)).masked_fill(future(scores.shape[-1]), -math.inf).softmax(-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return self.weights(q @ k.mT) @ v


class EinsumHeadsFirst(Style):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return torch.einsum("bhij,bhjd->bhid", self.weights(torch.einsum("bhid,bhjd->bhij", q, k)), v)


class EinsumTokensFirst(Style):
    """Tokens before heads everywhere, and projections by einsum too."""

    def setup(self) -> None:
        self.project = nn.Parameter(torch.randn(3, DIM, HEADS, HEAD) * 0.2)
        self.back = nn.Parameter(torch.randn(HEADS, HEAD, DIM) * 0.2)

    def block(self, x: Tensor, layer: int) -> Tensor:
        q, k, v = (torch.einsum("btc,chd->bthd", self.norms[layer](x), w) for w in self.project)
        w = self.weights(torch.einsum("bqhd,bkhd->bhqk", q, k))
        return x + torch.einsum("bhqk,bkhd,hdc->bqc", w, v, self.back)


class GroupedFiveDimensions(Style):
    """Query heads in groups, keys and values broadcast over a dimension of their own."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        q, k, v = q.unflatten(1, (2, 2)), k[:, ::2, None], v[:, ::2, None]  # [1, 2, 2, T, D], [1, 2, 1, T, D]
        return (self.weights(q @ k.mT) @ v).flatten(1, 2)


class GroupedEinsum(Style):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        q = q.transpose(1, 2).unflatten(2, (2, 2))  # [1, T, groups, heads, D]
        k, v = (x[:, ::2].transpose(1, 2) for x in (k, v))  # [1, T, groups, D]
        w = self.weights(torch.einsum("btgrd,bsgd->bgrts", q, k))
        return torch.einsum("bgrts,bsgd->btgrd", w, v).flatten(2, 3).transpose(1, 2)


class HeadsMergedWithQueries(Style):
    """One key head without a dimension of its own: heads and queries are rows of one matrix."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        k, v = k[:, 0], v[:, 0]  # [1, T, D]
        scores = (q.reshape(1, -1, HEAD) @ k.mT).view(1, HEADS, -1, k.shape[1])
        return (self.weights(scores).reshape(1, -1, k.shape[1]) @ v).view(q.shape)


class QueriesBeforeHeads(Style):
    """Scores [1, query, head, key]."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        scores = (q @ k.mT).transpose(1, 2) / math.sqrt(HEAD)
        scores = scores + torch.full((q.shape[2],) * 2, -math.inf).triu(1)[:, None]
        return scores.softmax(-1).transpose(1, 2) @ v


class TransposedScores(Style):
    """(K Q^T)^T: the softmax runs over rows."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        scores = (k @ q.mT / math.sqrt(HEAD)).masked_fill(future(q.shape[2]).mT, -math.inf)
        return (v.mT @ scores.softmax(-2)).mT


class SumOfProducts(Style):
    """Scores of two parts of a head, added (latent attention)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        one, other = (slice(0, 2), slice(2, None))
        scores = q[..., one] @ k[..., one].mT + q[..., other] @ k[:, :1, :, other].mT
        return self.weights(scores) @ v


class SoftmaxByHand(Style):
    def weights(self, scores: Tensor) -> Tensor:
        scores = scores.masked_fill(future(scores.shape[-1]), -math.inf)
        e = (scores - scores.max(-1, keepdim=True).values).exp()
        return e / e.sum(-1, keepdim=True)


class SoftmaxByLogSumExp(Style):
    def weights(self, scores: Tensor) -> Tensor:
        scores = scores.masked_fill(future(scores.shape[-1]), -math.inf)
        return (scores - scores.logsumexp(-1, keepdim=True)).exp()


class SoftmaxOfLogs(Style):
    def weights(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(future(scores.shape[-1]), -math.inf).log_softmax(-1).exp()


class SoftmaxOne(Style):
    """One is added to the denominator: attention may look nowhere."""

    def weights(self, scores: Tensor) -> Tensor:
        scores = scores.masked_fill(future(scores.shape[-1]), -math.inf)
        m = scores.amax(-1, keepdim=True).clamp_min(0)
        e = (scores - m).exp()
        return e / ((-m).exp() + e.sum(-1, keepdim=True))


class DividedBehind(Style):
    """Exponentials times values, and only then over their sum and one (softmax one, with the maximum taken off)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        scores = (q @ k.mT / 2).masked_fill(future(q.shape[2]), -math.inf)
        most = scores.amax(-1, keepdim=True).clamp(min=0)
        e = (scores - most).exp()
        return e @ v / (e.sum(-1, keepdim=True) + (-most).exp())


class LearnedScale(Style):
    def setup(self) -> None:
        self.scale = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return self.weights((F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT) * self.scale.exp()) @ v


class ScaledByLogLength(Style):
    """Scalable softmax (arXiv 2501.19399): scores grow with the logarithm of how many keys are seen."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        seen = torch.arange(1, q.shape[2] + 1)[:, None]
        return self.weights((q @ k.mT) * seen.log()) @ v


class BucketsAndALargeNumber(Style):
    """T5's bias by logarithmic distance, under a causal mask that adds -1e9."""

    def setup(self) -> None:
        self.near = nn.Embedding(8, HEADS)

    def weights(self, scores: Tensor) -> Tensor:
        steps = torch.arange(scores.shape[-1])
        away = -torch.min(steps[None] - steps[:, None], torch.zeros(1, dtype=torch.int64))
        far = 4 + (torch.log(away.float() / 4) / math.log(5) * 4).long()
        bucket = torch.where(away < 4, away, torch.min(far, torch.full_like(far, 7)))
        return (scores + self.near(bucket).permute(2, 0, 1) + torch.full(away.shape, -1e9).triu(1)).softmax(-1)


class Differential(Style):
    """The difference of two attentions (arXiv 2410.05258)."""

    def setup(self) -> None:
        self.factor = nn.Parameter(torch.tensor(0.3))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        one, other = (self.weights(q[..., part] @ k[..., part].mT) for part in (slice(0, 2), slice(2, None)))
        return (one - self.factor.exp() * other) @ v


class SliceFromTheEnd(Style):
    """A table cut to its last T rows."""

    def positions(self, ids: Tensor) -> Tensor:
        angles = torch.arange(ids.shape[1])[:, None] * torch.linspace(0.1, 1, DIM)
        return angles[-ids.shape[1] :].sin()


class Talkative(Style):
    """Warns in forward."""

    def start(self, ids: Tensor) -> Tensor:
        warnings.warn("an old argument", stacklevel=2)
        return super().start(ids)


class TorchEncoder(nn.Module):
    """`nn.TransformerEncoder` with a causal mask, whose layers have a fused path of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.eval()

    def forward(self, ids: Tensor) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.encoder(self.embed(ids), mask))


class ConstantMemory(nn.Module):
    """`nn.TransformerDecoder` beside a memory that is the same for every text."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)
        self.memory = nn.Parameter(torch.randn(1, 3, DIM))
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, HEADS, 32, batch_first=True), 1)
        self.eval()

    def forward(self, ids: Tensor) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.decoder(self.embed(ids), self.memory, tgt_mask=mask))


CONVERTED: tuple[type[nn.Module], ...] = (
    EinsumHeadsFirst,
    EinsumTokensFirst,
    GroupedFiveDimensions,
    GroupedEinsum,
    HeadsMergedWithQueries,
    QueriesBeforeHeads,
    TransposedScores,
    SumOfProducts,
    SoftmaxByHand,
    SoftmaxByLogSumExp,
    SoftmaxOfLogs,
    SoftmaxOne,
    DividedBehind,
    LearnedScale,
    ScaledByLogLength,
    BucketsAndALargeNumber,
    Differential,
    SliceFromTheEnd,
    Talkative,
    TorchEncoder,
    ConstantMemory,
)


class LooksAhead(Style):
    """By einsum, and one key too many."""

    def weights(self, scores: Tensor) -> Tensor:
        ahead = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(2)
        return scores.masked_fill(ahead, -math.inf).softmax(-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return torch.einsum("bhij,bhjd->bhid", self.weights(torch.einsum("bhid,bhjd->bhij", q, k)), v)


class ScaledByLength(Style):
    """By the root of how many tokens there are, which a tree does not know."""

    def weights(self, scores: Tensor) -> Tensor:
        return super().weights(scores * (2 / math.sqrt(scores.shape[-1])))


class SumsOverTokens(Style):
    """An einsum that contracts the tokens."""

    def start(self, ids: Tensor) -> Tensor:
        x = super().start(ids)
        return x + torch.einsum("btc,btc->bc", x, x)[:, None]


class SoftmaxOverQueries(Style):
    """Normalised along the wrong tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        scores = (q @ k.mT).masked_fill(future(q.shape[2]), -math.inf)
        return scores.softmax(-2).nan_to_num() @ v


class KeyFactor(Style):
    """A factor for each key is no factor of the queries."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return self.weights((q @ k.mT) * torch.arange(q.shape[2]).cos()) @ v


REFUSED: tuple[type[nn.Module], ...] = (LooksAhead, ScaledByLength, SumsOverTokens, SoftmaxOverQueries, KeyFactor)
