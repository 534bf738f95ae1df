"""Decoders that hide padding: keys whose token is one of a few. Each returns [1, T, V] logits of token ids [1, T]."""

from __future__ import annotations

import math

import torch
from modules import DIM, HEADS, Tiny
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

PAD, OTHER = 2, 7


class Padded(Tiny):
    """The mask of one text is kept for its layers by the methods below."""

    layers = 1
    hidden: tuple[int, ...] = (PAD,)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.start(ids)
        for layer in range(self.layers):
            q, k, v = (self.split(part) for part in self.qkv[layer](self.norms[layer](x)).chunk(3, -1))
            x = x + self.out[layer](self.join(self.mixed(q, k, v, ids, x)))
        return self.finish(x)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, x: Tensor) -> Tensor:
        mask = self.shown(ids, torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril())
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def shown(self, ids: Tensor, causal: Tensor) -> Tensor:
        return causal[None, None] & (ids != PAD)[:, None, None, :]


class TwoTokens(Padded):
    """In two layers: padding never reaches anybody, through other tokens neither."""

    layers = 2
    hidden = (PAD, OTHER)

    def shown(self, ids: Tensor, causal: Tensor) -> Tensor:
        return (causal & ~((ids == PAD) | (ids == OTHER))[:, None, :])[:, None]


class FilledScores(Padded):
    """One condition on scores; ids up to a number are special."""

    hidden = (0, 1, 2)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, x: Tensor) -> Tensor:
        t = ids.shape[1]
        seen = torch.logical_and(torch.ones(t, t, dtype=torch.bool).tril(), (ids > 2)[:, None, None, :])
        return (q @ k.mT / 2).masked_fill(~seen, -1e9).softmax(-1) @ v


class ProductOfMasks(Padded):
    """(1 - causal * padding) * -1e4, added to scores."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, x: Tensor) -> Tensor:
        t = ids.shape[1]
        seen = torch.ones(t, t).tril() * (ids != PAD).float()[:, None, None, :]
        return (q @ k.mT / 2 + (1.0 - seen) * -10000.0).softmax(-1) @ v


class BesideSlopes(Padded):
    """ALiBi, whose mask is filled where there is padding; a bias by key as well."""

    def setup(self) -> None:
        self.worth = nn.Linear(DIM, HEADS)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, x: Tensor) -> Tensor:
        steps = torch.arange(ids.shape[1])
        away = (steps[None, :] - steps[:, None]) * 2.0 ** -torch.arange(1, HEADS + 1)[:, None, None]
        mask = away.masked_fill(steps[None, :] > steps[:, None], -math.inf)[None]
        mask = mask.masked_fill((ids == PAD)[:, None, None, :], -math.inf)
        scores = q @ k.mT / 2 + self.worth(x).transpose(1, 2)[:, :, None, :]
        return (scores + mask).softmax(-1) @ v


class OwnModule(Padded):
    """`nn.MultiheadAttention` is given both masks; it makes numbers of them and adds these."""

    need_weights = False

    def setup(self) -> None:
        self.mixer = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.start(ids)
        future = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        mixed, _ = self.mixer(x, x, x, key_padding_mask=ids == PAD, attn_mask=future, need_weights=self.need_weights)
        return self.finish(x + mixed)


class OwnModuleWithWeights(OwnModule):
    need_weights = True


class OwnEncoder(Padded):
    """As tutorials build language models."""

    def setup(self) -> None:
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.finish(self.encoder(self.start(ids), mask, src_key_padding_mask=ids == PAD))


CONVERTED: tuple[type[Padded], ...] = (
    Padded,
    TwoTokens,
    FilledScores,
    ProductOfMasks,
    BesideSlopes,
    OwnModule,
    OwnModuleWithWeights,
    OwnEncoder,
)


class HidesByTheNext(Padded):
    """A key is hidden by the token behind it."""

    def shown(self, ids: Tensor, causal: Tensor) -> Tensor:
        return causal[None, None] & (ids.roll(-1, 1) != PAD)[:, None, None, :]


class HidesQueries(Padded):
    """Padding sees nothing either, and is NaN."""

    def shown(self, ids: Tensor, causal: Tensor) -> Tensor:
        there = ids != PAD
        return causal[None, None] & (there[:, None, None, :] & there[:, None, :, None])


class HidesByTheLength(Padded):
    def shown(self, ids: Tensor, causal: Tensor) -> Tensor:
        return causal[None, None] & (ids != ids.shape[1])[:, None, None, :]


class HidesByHowMany(Padded):
    """What stands behind the first padding is hidden."""

    def shown(self, ids: Tensor, causal: Tensor) -> Tensor:
        return causal[None, None] & ((ids == PAD).cumsum(1) == 0)[:, None, None, :]


class HidesByTheFirst(Padded):
    """A token is hidden that is the same as the first."""

    def shown(self, ids: Tensor, causal: Tensor) -> Tensor:
        return causal[None, None] & (ids != ids[:, :1])[:, None, None, :]


class HidesInAWindow(Padded):
    """All three may be padding, and then nothing is seen."""

    def shown(self, ids: Tensor, causal: Tensor) -> Tensor:
        return (causal & causal.triu(-2))[None, None] & (ids != PAD)[:, None, None, :]


class HidesByContent(Padded):
    def mixed(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, x: Tensor) -> Tensor:
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        return scaled_dot_product_attention(q, k, v, attn_mask=causal & (x[..., 0] > 0)[:, None, None, :])


class AddsTruths(Padded):
    """True and False are added to scores: 1 and 0, which hide nothing."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, x: Tensor) -> Tensor:
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        return (q @ k.mT / 2 + (causal & (ids != PAD)[:, None, None, :])).softmax(-1) @ v


class AddsPlaces(Padded):
    """The same of a condition on places alone."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, x: Tensor) -> Tensor:
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        return (q @ k.mT / 2 + causal).softmax(-1) @ v


class SeesAnother(Padded):
    """A look ahead by one, beside padding."""

    def shown(self, ids: Tensor, causal: Tensor) -> Tensor:
        return torch.ones_like(causal).tril(1)[None, None] & (ids != PAD)[:, None, None, :]


class SeesWherePadding(Padded):
    """Padding is seen from everywhere."""

    def shown(self, ids: Tensor, causal: Tensor) -> Tensor:
        return causal[None, None] | (ids == PAD)[:, None, None, :]


REFUSED: tuple[type[Padded], ...] = (
    HidesByTheNext,
    HidesQueries,
    HidesByTheLength,
    HidesByHowMany,
    HidesByTheFirst,
    HidesInAWindow,
    HidesByContent,
    AddsTruths,
    AddsPlaces,
    SeesAnother,
    SeesWherePadding,
)
