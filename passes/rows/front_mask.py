"""What rows in front of the text see of each other, and that what must not be seen is hidden."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import sympy
import torch
from torch import Tensor, fx

from ..forms.by_value import SampledValues
from ..forms.closed_form import shape_of
from ..forms.evaluate import TooLarge
from ..forms.masks import HIDDEN
from ..framework.state import GraphState

aten = torch.ops.aten


class RowCounts(Protocol):
    """How many rows there are: the tokens', and with those beside them."""

    @property
    def length(self) -> sympy.Expr: ...
    @property
    def whole(self) -> sympy.Expr: ...
    @property
    def front(self) -> bool: ...
    @property
    def count(self) -> int: ...


@dataclass(frozen=True)
class FrontBlock:
    """What the n rows in front see of each other: "causal", "all", or nothing is said ("behind")."""

    kind: str

    def hide(self, state: GraphState, at: fx.Node, scores: fx.Node, n: int) -> fx.Node:
        """Their scores [.., n, n], masked."""
        if self.kind != "causal":
            return scores

        def emit(op: Any, *args: Any) -> fx.Node:
            return state.call(op, args, {}, like=at)

        device = {"device": scores.meta["val"].device}
        places = state.call(aten.arange.default, (n,), device, like=at)
        later = emit(aten.lt.Tensor, emit(aten.unsqueeze.default, places, -1), places)
        return emit(aten.masked_fill.Scalar, scores, later, -math.inf)


def block_of(state: GraphState, mask: fx.Node, places: RowCounts, *, visible: bool) -> FrontBlock | None:
    """What a mask [.., whole, whole] shows of those who come first; None: some of what comes later, or something else.

    `visible`: whether true means that a key is seen; of numbers, HIDDEN and less hides. Decided on the mask's values,
    at all places of every small number of tokens and at samples of larger ones, up to where they can be computed.
    """
    shape = shape_of(mask)
    rank = len(shape)
    if rank < 2 or shape[-1] != places.whole or shape[-2] != places.whole:
        return None
    if any(s != 1 for s in shape[:-2]):
        return None
    state.proved_by(mask)
    sampled = SampledValues(mask, state.gm, state.tokens, state.constants, state.max_context)
    found: FrontBlock | None = None
    for n in sampled.lengths():
        whole, length = (int(e.xreplace({state.length: sympy.Integer(n)})) for e in (places.whole, places.length))
        first = whole - length if places.front else length
        try:
            rows = _sampled(sampled, first, n) if not places.front else torch.arange(first)
            own = torch.arange(first) if places.front else rows[:0]
            later = first + _sampled(sampled, whole - first, n)
            seen = _seen(sampled, n, rows, torch.cat([own, later]), visible)
        except (IndexError, RuntimeError, TooLarge):
            return found
        if seen is None or bool(seen[:, len(own) :].any()):
            return None
        here = _kind(seen[:, : len(own)]) if places.front else FrontBlock("behind")
        if here is None or (found is not None and here != found):
            return None
        found = here
    return found


def _sampled(sampled: SampledValues, count: int, n: int) -> Tensor:
    if count <= 0:
        return torch.arange(0)
    return sampled.places(count) if count > 1 else torch.arange(count)


def _seen(sampled: SampledValues, n: int, rows: Tensor, columns: Tensor, visible: bool) -> Tensor | None:
    rank = sampled.node.meta["val"].dim()
    values = sampled.at(n, [None] * (rank - 2) + [rows, columns]).reshape(len(rows), len(columns))
    if values.dtype is torch.bool:
        return values if visible else ~values
    if values.is_floating_point():
        shown = values == 0
        return shown if bool((shown | (values <= HIDDEN)).all()) else None
    return (values != 0) if visible else (values == 0)


def _kind(seen: Tensor) -> FrontBlock | None:
    if bool(seen.all()):
        return FrontBlock("all" if len(seen) > 1 else "causal")
    return FrontBlock("causal") if torch.equal(seen, torch.ones_like(seen).tril()) else None
