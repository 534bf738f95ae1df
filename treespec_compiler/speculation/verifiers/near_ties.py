"""Steps whose choice rounding could have turned: they are counted, not hidden."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ir.accept import any_near_tie

# Relative to the larger logit: twice the spacing of the dtype's numbers, what one rounding more or less can move.
TOLERANCE = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def near_tie(logits: Tensor, path: Sequence[int], tolerance: float) -> bool:
    """Whether rounding could have decided any of the path's choices. logits [N, V]."""
    return any_near_tie(logits[list(path)], tolerance)
