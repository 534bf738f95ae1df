"""Decoders whose branches ask whether anything is picked: where nothing is, nothing changes, or something does."""

from __future__ import annotations

import math
from typing import Any

import torch
from decoders import Style, future
from modules import DIM
from torch import Tensor, nn
from torch.nn import functional as F

EXPERTS = 3


class Routed(Style):
    """One expert a token; `add` is the loop over experts."""

    def setup(self) -> None:
        self.router = nn.Linear(DIM, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(EXPERTS))
        self.scale = 1.0

    def finish(self, x: Tensor) -> Any:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        return self.head(x + self.add(x, weights, chosen))

    def add(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            mask = (chosen == e).any(-1)
            if mask.any():
                out[mask] += self.experts[e](x[mask])
        return out


class RowsOfIndexAdd(Routed):
    """Rows of a flat text; an expert that nobody chose is passed over."""

    def add(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        flat, w, c = x.view(-1, DIM), weights.view(-1, 2), chosen.view(-1, 2)
        out = torch.zeros_like(flat)
        for e in range(EXPERTS):
            rows, place = torch.where(c == e)
            if rows.numel() == 0:
                continue
            given = flat[rows]
            made = self.experts[e](given) * w[rows, place, None]
            out.index_add_(0, rows, made)
        return out.view_as(x)


class RowsOfOneChoice(Routed):
    """As in a switch transformer: the count of a mask decides, a copy is made on the way."""

    def add(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = x.clone()
        for e, expert in enumerate(self.experts):
            mask = chosen[..., 0] == e
            if mask.sum().item() > 0:
                picked = x[mask]
                picked = F.gelu(expert(picked))
                out[mask] = picked
        return out


class RowsByNonzero(Routed):
    def add(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        flat = x.view(-1, DIM)
        out = torch.zeros_like(flat)
        for e in range(EXPERTS):
            (rows,) = torch.where(chosen.view(-1, 2)[:, 0] == e)
            if len(rows) > 0:
                out[rows] = out[rows] + self.experts[e](flat[rows])
        return out.view_as(x)


class HidesIfAny(Style):
    """A mask is laid over scores where it hides something."""

    def weights(self, scores: Tensor) -> Tensor:
        hidden = future(scores.shape[-1])
        if hidden.any():
            scores = scores.masked_fill(hidden, -math.inf)
        return scores.softmax(-1)


class HidesUnlessAllSeen(Style):
    def weights(self, scores: Tensor) -> Tensor:
        seen = ~future(scores.shape[-1])
        if not seen.all():
            scores = torch.where(~seen, -math.inf, scores)
        return scores.softmax(-1)


class CausalIfMany(Style):
    """One token needs no mask."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)


class CausalByPlace(Style):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        many = q.size(2) != 1
        return F.scaled_dot_product_attention(q, k, v, None, 0.0, many)


class CausalIfFew(Style):
    """The context ends where it would no longer be causal."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] < 40)


CONVERTED: tuple[type[Style], ...] = (
    Routed,
    RowsOfIndexAdd,
    RowsOfOneChoice,
    RowsByNonzero,
    HidesIfAny,
    HidesUnlessAllSeen,
    CausalIfMany,
    CausalByPlace,
    CausalIfFew,
)


class OtherRows(Routed):
    """What is not picked is written."""

    def add(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out, mask = torch.zeros_like(x), chosen[..., 0] == 0
        if mask.any():
            out[~mask] = 1.0
        return out


class AllRows(Routed):
    """The text as a whole is another one where a token chose the expert."""

    def add(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        mask = chosen[..., 0] == 0
        if mask.any():
            x = x * 2
        return x


class InPlace(Routed):
    def add(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out, mask = x.clone(), chosen[..., 0] == 0
        if mask.any():
            out[mask] = out.add_(1)[mask]
        return out


class InPlaceByHelper(Routed):
    def change(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.add_(1)[mask]

    def add(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out, mask = x.clone(), chosen[..., 0] == 0
        if mask.any():
            out[mask] = self.change(out, mask)
        return out


class InPlaceByAlias(Routed):
    """`type_as` gives its argument itself, which is then changed as a whole."""

    def change(self, x: Tensor) -> Tensor:
        return x.add_(1).mean((0, 1))

    def add(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out, mask = x.clone(), chosen[..., 0] == 0
        if mask.any():
            same = out.type_as(x[mask])
            out[mask] = self.change(same)
        return out


class InPlaceByFlag(Routed):
    def add(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out, mask = x.clone(), chosen[..., 0] == 0
        if mask.any():
            out[mask] = F.relu(out, True)[mask]
        return out


class ReadAfterwards(Routed):
    def add(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out, mask, factor = x.clone(), chosen[..., 0] == 0, 1.0
        if mask.any():
            factor = 2.0
            out[mask] = 0.0
        return out * factor


class ReadNextTime(Routed):
    """What the branch of another expert left behind is read."""

    def add(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out, factor = torch.zeros_like(x), 1.0
        for e in range(EXPERTS):
            mask = chosen[..., 0] == e
            if mask.any():
                out[mask] = self.experts[e](x[mask]) * factor
                factor = 0.5
        return out


class CountsOnItself(Routed):
    def add(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out, mask = torch.zeros_like(x), chosen[..., 0] == 0
        if mask.any():
            self.scale = 2.0
            out[mask] = 1.0
        return out * self.scale


class NumbersForAMask(Routed):
    """Numbers, of which zeros are rows and no misses."""

    def add(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out, rows = torch.zeros(EXPERTS, DIM), chosen[0, :, 0]
        if rows.any():
            out[rows] = 1.0
        return x + out.sum(0)


class CastMask(Routed):
    """A mask as numbers picks row 0 where it is false everywhere."""

    def add(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out, mask = torch.zeros(2, DIM), chosen[0, :, 0] == 0
        if mask.any():
            out[mask.long()] = 1.0
        return x + out[0]


class SumOfNumbers(Routed):
    def add(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out, some = x.clone(), weights[..., 0] - weights[..., 1]
        if some.sum() > 0:
            out = out.masked_fill(some.bool()[..., None], 0.0)
        return out


class ByName(Routed):
    """A dict under the mask as a key."""

    def add(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        found: dict[Any, Any] = {}
        mask = chosen[..., 0] == 0
        if mask.any():
            found[mask] = 1.0
        return x * (1 + len(found))


class AnotherMaskByThen(Routed):
    def add(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out, mask = torch.zeros_like(x), chosen[..., 0] == 0
        rows = torch.where(mask)[1]
        mask = chosen[..., 0] == 1
        if rows.numel() > 0:
            out[mask] = 1.0
        return out


class Otherwise(Routed):
    def add(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out, mask = torch.zeros_like(x), chosen[..., 0] == 0
        if mask.any():
            out[mask] = 1.0
        else:
            out = out + 1
        return out


class AllAskedForAny(Routed):
    """`all` where `any` is meant: a mask that is true here and there is passed over."""

    def add(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out, mask = torch.zeros_like(x), chosen[..., 0] == 0
        if mask.all():
            out[mask] = 1.0
        return out


class WiderThanItself(Routed):
    """Where something is picked, what comes out has another shape, and is summed in another way."""

    def add(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        kept, mask = x[..., :1], chosen[..., :1] == 0
        if mask.any():
            kept = torch.where(mask, x, kept)
        return x + kept.sum(-1, keepdim=True)


class Noted(nn.Linear):
    """It says that it was asked."""

    asked = 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.asked = 2.0
        return super().forward(x)


class ReadsANote(Routed):
    """What an expert says of itself is read behind the branch."""

    def setup(self) -> None:
        super().setup()
        self.experts = nn.ModuleList(Noted(DIM, DIM) for _ in range(EXPERTS))

    def add(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        for expert in self.experts:
            expert.asked = 1.0
        made = super().add(x, weights, chosen)
        return made * sum(expert.asked for expert in self.experts)  # type: ignore[misc]


class HidesTooLittle(Style):
    """A key too many."""

    def weights(self, scores: Tensor) -> Tensor:
        hidden = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(2)
        if hidden.any():
            scores = scores.masked_fill(hidden, -math.inf)
        return scores.softmax(-1)


class CausalIfManyMore(Style):
    """Short texts are seen as a whole."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 5)


REFUSED: tuple[type[Style], ...] = (
    OtherRows,
    AllRows,
    InPlace,
    InPlaceByHelper,
    InPlaceByAlias,
    InPlaceByFlag,
    ReadAfterwards,
    ReadNextTime,
    CountsOnItself,
    NumbersForAMask,
    CastMask,
    SumOfNumbers,
    ByName,
    AnotherMaskByThen,
    Otherwise,
    AllAskedForAny,
    WiderThanItself,
    ReadsANote,
    HidesTooLittle,
    CausalIfManyMore,
)
