"""Weights rounded to blocks of 32 on request (`weights="int8"`, `"int4"`): the values that a narrow form holds exactly.

Symmetric: a block has one step d in float16, and its value furthest from zero is a multiple of d that no other exceeds,
as in GGUF's Q8_0 and Q4_0 (ggml-quants.c). So the form is found again from the values (`ir.narrow`), and whoever runs
the model with them runs what the program computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidWeight
from .narrow import CHUNK
from .panels import GROUP

STORAGES = {"int8": "q8_0", "int4": "q4_0"}
"""What a user asks for, and the form that holds it."""
_LEVELS = {"int8": (127,), "int4": (-8, 7)}
"""Of the value furthest from zero; the block takes the one with the smaller error. GGUF's Q4_0 has the first alone."""
_RANGE = {"int8": (-127, 127), "int4": (-8, 7)}


def quantized(weight: Tensor, storage: str) -> Tensor:
    """The float32 matrix [N, K] rounded, 32 values along K to a block; K is a multiple of 32.

    Raises InvalidWeight where a value is not finite, or larger than a step in float16 reaches.
    """
    made = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    rows = max(1, CHUNK // max(1, weight.shape[1]))
    for row in range(0, len(weight), rows):
        part = weight[row : row + rows]
        made[row : row + rows] = _blocks(part.reshape(-1, GROUP), storage).view(part.shape)
    return made


def _blocks(groups: Tensor, storage: str) -> Tensor:
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    furthest = torch.where(-low > high, low, high)
    best = error = None
    for level in _LEVELS[storage]:
        step = (furthest / level).half().float()
        if not step.isfinite().all():
            expected = "finite values, of at most 65504 steps"
            raise InvalidWeight(got=f"a matrix whose largest value is {furthest.abs().max():.3g}", expected=expected)
        least, most = _RANGE[storage]
        q = (groups / step.masked_fill(step == 0, 1.0)).round_().clamp_(least, most)
        # NOTE the step was rounded, by a lot if it is tiny: the furthest value keeps its level, or no step is found
        q = torch.where(groups == furthest, float(level), q) + 0.0  # an integer has no negative zero
        made = q * step
        missed = (made - groups).square().sum(1, keepdim=True)
        if best is None or error is None:
            best, error = made, missed
        else:
            best, error = torch.where(missed < error, made, best), torch.minimum(missed, error)
    assert best is not None
    return best
