"""Masks that hide a token from itself, but not where nothing comes before it (Reformer).

The own key is far below all earlier ones, so it counts for nothing beside them, and later ones are as far below it. Of
one key alone a softmax is 1, whatever its score. So nothing is hidden but what comes later, and the own key has a bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .patterns import HIDDEN


def hides_itself(cells: dict[int, Any], hidden: set[int]) -> bool:
    """Whether all earlier keys are seen as they are, the query's own far below them, and later ones as far below that
    (Reformer): a query sees itself where nothing comes before it. That is a bias of the distance 0.
    """
    own = cells[0]
    seen = all(value == 0 for distance, value in cells.items() if distance > 0)
    if 0 not in hidden or not seen or not own.is_number or own.is_infinite:
        return False
    later = [value for distance, value in cells.items() if distance < 0]
    return all(value.is_number and bool(value <= own + HIDDEN) for value in later)


def own_far_below(values: Tensor, shown: Tensor) -> Tensor:
    """The diagonal of [heads, n, n], where it is seen in the row in which no key comes before (`hides_itself`)."""
    own = values.diagonal(dim1=1, dim2=2)
    later = values.masked_fill(values.new_ones(values.shape[1:]).tril().bool(), -torch.inf).amax((1, 2))
    earlier = torch.equal(shown, torch.ones_like(shown).tril(-1))
    far = earlier and bool(own.isfinite().all()) and bool((own == own[:, :1]).all())
    far = far and bool((later <= own[:, 0] + HIDDEN).all())
    return torch.eye(len(values[0]), dtype=torch.bool).expand(values.shape) if far else torch.zeros_like(shown)
