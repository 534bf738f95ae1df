"""A mask and what it adds to the scores, compared with the values that the model computes.

What is claimed is read off a closed form by algebra; the model's numbers round, wrap and absorb each other. A claim
that fails for few tokens is refused, one that fails for many bounds the context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .biases import NotAMask
from .by_value import LONGEST, SampledValues, proved_up_to
from .evaluate import TooLarge
from .masks import HIDDEN, Scoring

# How far a bias may be from its closed form, in scores, and relative to itself where it is large. A float32 model's own
# scores are as far apart where its sums are made in another order.
_CLOSE, _RELATIVE = 2e-4, 1e-6
# A claim that holds for fewer tokens than this is refused.
_LEAST = 64
# Slopes are read over a distance of up to this: the rounding of two far numbers is divided by it.
_LONGEST_SLOPE = 4096


def checked(
    scoring: Scoring, table: Tensor | None, sampled: SampledValues, sinks: bool, hides: float = HIDDEN
) -> int | None:
    """The longest context in which the mask's values are what `scoring` says; None: any that is looked at.

    `table`: slopes [heads], or a bias [heads, distances] or [places, heads, distances]. `hides`: how far below what is
    seen a hidden score must be; a bias that the mask does not know could overcome less. Raises `NotAMask`.
    """
    ceiling = min(sampled.ceiling, scoring.mask.limit or LONGEST)
    sampled.ceiling = ceiling
    proved = proved_up_to(sampled, lambda n: _agrees(scoring, table, sampled, n, sinks, hides))
    if proved < min(ceiling, _LEAST):
        raise NotAMask(
            f"the mask's closed form {scoring.text} disagrees with its values with more than {max(proved, 1)} tokens: "
            "the model's numbers round, wrap or hide less than they seem to"
        )
    return None if proved >= ceiling else proved


def _agrees(scoring: Scoring, table: Tensor | None, sampled: SampledValues, n: int, sinks: bool, hides: float) -> bool:
    rows, columns = sampled.pairs(n)
    values = block(sampled, n, rows, columns)
    visible = scoring.mask.visible(rows[:, None], columns[None, :])
    if values.dtype is torch.bool:
        return bool((values == visible).all())
    values = values.double()
    if bool(values.isnan().any()):
        return False
    highest = values.masked_fill(~visible, -torch.inf).amax(-1, keepdim=True)
    if bool((values - highest > hides)[:, ~visible].any()) or bool((values <= HIDDEN)[:, visible].all(-1).any()):
        return False
    gaps = rows[:, None] - columns[None, :]
    own = torch.searchsorted(columns, rows).view(1, -1, 1).expand(len(values), -1, 1)
    shift = 0.0 if sinks or scoring.bias in ("distance", "places") else values.gather(-1, own)
    if table is None:
        return bool((values == shift)[:, visible].all())
    known = table.detach().cpu().double()
    wanted = _wanted(known, rows, gaps)
    off = (values - shift - wanted)[:, visible].abs()
    return bool((off <= _CLOSE + _RELATIVE * wanted[:, visible].abs()).all())


def _wanted(known: Tensor, rows: Tensor, gaps: Tensor) -> Tensor:
    """[heads, q, k]: what a table says for queries at `rows` and distances [q, k]."""
    if known.dim() == 1:
        return -known[:, None, None] * gaps
    near = gaps.clamp(0, known.shape[-1] - 1)
    return known[:, near] if known.dim() == 2 else known[rows[:, None], :, near].permute(2, 0, 1)


def block(sampled: SampledValues, n: int, rows: Tensor, columns: Tensor) -> Tensor:
    """[heads or 1, rows, columns] of a mask [.., T or 1, T or 1] for n tokens."""
    rank = sampled.node.meta["val"].dim()
    index = [None] * max(rank - 2, 0) + ([rows, columns] if rank > 1 else [columns])
    values = sampled.at(n, index)
    wide = values.expand(*values.shape[:-2], len(rows), len(columns))
    return wide.reshape(-1, len(rows), len(columns))


def readable(sampled: SampledValues, most: int) -> int:
    """The largest number of tokens up to `most` for which the last query's row can be computed (a table may end)."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        try:
            block(sampled, middle, torch.tensor([middle - 1]), torch.arange(middle))
            low = middle
        except (IndexError, RuntimeError, TooLarge):
            high = middle - 1
    return low


def slope_distance(scoring: Scoring, sampled: SampledValues) -> int:
    """The power of two over which a slope is read: a visible distance."""
    mask = scoring.mask
    most = min(x for x in (mask.window or LONGEST, mask.chunk or LONGEST, sampled.ceiling, _LONGEST_SLOPE + 1))
    return 1 << max(min(most, readable(sampled, most)) - 1, 1).bit_length() - 1
