"""Steps whose choice rounding could have turned: they are counted, not hidden."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Relative to the larger logit: twice the spacing of the dtype's numbers, what one rounding more or less can move.
TOLERANCE = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def near_tie(logits: Tensor, path: Sequence[int], tolerance: float) -> bool:
    """Whether rounding could have decided any of the path's choices. logits [N, V]."""
    best = logits[list(path)].float().topk(2, dim=-1).values  # [path, 2]
    near = best[:, 0] - best[:, 1] <= tolerance * best.abs().amax(-1)
    return bool((near & best.isfinite().all(-1)).any())  # nothing is near a logit that stands alone
