"""What is added to the scores of rows in front of the text: ALiBi or a relative bias over a prompt and the text.

The rows in front are computed apart, so that what is added to their scores of each other must be the same numbers in
every text, and what is added to those of later keys must not bring back a key that a mask hides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.provenance import source_line
from treespec_compiler.ir.specs import Limit

from ..attention.score_pack import ROWS, score_table
from ..forms.by_value import SampledValues, proved_up_to, same_bits
from ..forms.closed_form import shape_of
from ..forms.masks import HIDDEN
from ..forms.score_check import block
from ..framework.state import GraphState
from .front_mask import RowCounts

aten = torch.ops.aten

# A hidden score is HIDDEN or less; what is added to it may be this much more than what is added to a seen one.
_MOST = 100.0
_LEAST = 64


@dataclass(frozen=True)
class FrontBias:
    """What is added to the scores of the n rows in front: `table` [heads or 1, n, n]."""

    table: fx.Node
    hides: bool
    """Whether what is added to the scores of later keys hides them."""

    def hide(self, state: GraphState, at: fx.Node, scores: fx.Node, n: int) -> fx.Node:
        """Their scores [.., heads, n, n], with it."""
        added = self.table
        if len(shape_of(scores)) == 2:
            added = state.call(aten.squeeze.dim, (added, 0), {}, like=at)
        return state.call(aten.add.Tensor, (scores, added), {}, like=at)


def bias_of(state: GraphState, added: fx.Node, places: RowCounts, at: fx.Node) -> FrontBias | None:
    """What a value [.., heads or 1, whole, whole] of places adds to the rows in front; new nodes stand before `at`.

    None: it is another one in each text, or it adds to the scores of some later keys so much that hidden ones are seen.
    """
    shape, count = shape_of(added), places.count
    if not places.front or len(shape) < 2 or shape[-2:] != (places.whole, places.whole):
        return None
    if not added.meta["val"].is_floating_point() or any(s != 1 for s in shape[:-3]):
        return None
    state.proved_by(added)
    sampled = SampledValues(added, state.gm, state.tokens, state.constants, state.max_context)
    own = torch.arange(count)
    first = block(sampled, 2, own, own)
    if not bool((first > HIDDEN).any(-1).all()):
        return None
    highest, hidden = first.amax(-1, keepdim=True), True

    def holds(n: int) -> bool:
        nonlocal hidden
        later = block(sampled, n, own, count + sampled.places(n))
        hidden &= bool((later <= HIDDEN).all())
        return same_bits(block(sampled, n, own, own), first) and bool((later - highest <= _MOST).all())

    proved = proved_up_to(sampled, holds)
    if proved < min(_LEAST, sampled.ceiling):
        return None
    if proved < sampled.ceiling:
        state.limits.append(Limit(proved, f"bias of rows in front of the text at {source_line(added) or added.name}"))
    return FrontBias(_table(state, added, at, count), hidden)


def _table(state: GraphState, added: fx.Node, at: fx.Node, count: int) -> fx.Node:
    """[heads or 1, n, n]: the first rows' numbers, made again when a weight changes."""

    def emit(op: Any, *args: Any) -> fx.Node:
        return state.call(op, args, {}, like=at)

    part = added
    for dim in (-2, -1):
        part = emit(aten.slice.Tensor, part, dim, 0, count)
    heads = int(shape_of(added)[-3]) if len(shape_of(added)) > 2 else 1
    made = score_table(state, part, ROWS, heads, count, count)
    return emit(aten.transpose.int, state.add_weight("score", made), 0, 1)
