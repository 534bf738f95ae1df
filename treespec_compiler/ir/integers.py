"""Integers of eight and four bits with a step in float32 for every 32 k: what libraries quantize modules to.

i8, 9 bits a weight: a float32 step an output, then 32 outputs of each k in eight bits: q d.
i4, 5 bits: a float32 step an output, then words of eight k for every output: (q - 8) d.

A step of 24 bits cannot be read off the values that it was multiplied to: it is known of the module
(`stored_weights.Dequantized`), for a run of k that is as long as it likes. Every value is compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .panels import GROUP, PANEL, StorageForm, from_nibbles, nibbles, rows_of

_STEP = 4 * PANEL


def form_of(levels: Tensor) -> str | None:
    """The form that holds these integers, of any shape; None where neither does."""
    least, most = (levels.amin(), levels.amax()) if levels.numel() else (levels.new_zeros(()), levels.new_zeros(()))
    for form, bits in (("i4", 4), ("i8", 8)):
        if -(1 << bits - 1) <= least and most < 1 << bits - 1:
            return form
    return None


def _integers(rows: Tensor, headers: Tensor | None, bits: int) -> tuple[Tensor, Tensor] | None:
    """q [32 p, blocks, 32] and steps [32 p, blocks]; None where a value is no such product."""
    if headers is None:
        return None
    steps = headers.contiguous().view(torch.float32)  # [32 p, blocks, 1]
    values = rows.unflatten(1, (-1, GROUP))
    quotients = values / steps.masked_fill(steps == 0, 1.0)
    # NOTE an integer has no negative zero
    q = quotients.round_().clamp_(-(1 << bits - 1), (1 << bits - 1) - 1).nan_to_num_().add_(0.0)
    if not torch.equal((q * steps).view(torch.int32), values.view(torch.int32)):
        return None
    return q, steps.squeeze(2)


def _by_output(steps: Tensor) -> Tensor:
    """[32 p, blocks] -> [p, blocks, 128] bytes."""
    return steps.view(-1, PANEL, steps.shape[1]).transpose(1, 2).contiguous().view(torch.uint8)


def _steps(packed: Tensor) -> Tensor:
    """The inverse: [p, blocks, 1, 32]."""
    return packed[..., :_STEP].contiguous().view(torch.float32).unsqueeze(2)


def _encode_i8(rows: Tensor, headers: Tensor | None) -> Tensor | None:
    found = _integers(rows, headers, 8)
    if found is None:
        return None
    q, steps = found
    whole = q.to(torch.int8).view(-1, PANEL, *q.shape[1:]).permute(0, 2, 3, 1)  # [p, blocks, 32 k, 32 outputs]
    return torch.cat([_by_output(steps), whole.contiguous().view(torch.uint8).flatten(2)], 2)


def _decode_i8(packed: Tensor) -> Tensor:
    return rows_of(packed[..., _STEP:].contiguous().view(torch.int8).unflatten(2, (GROUP, PANEL)) * _steps(packed))


def _encode_i4(rows: Tensor, headers: Tensor | None) -> Tensor | None:
    found = _integers(rows, headers, 4)
    if found is None:
        return None
    q, steps = found
    return torch.cat([_by_output(steps), nibbles((q + 8).view(-1, GROUP), len(rows) // PANEL)], 2)


def _decode_i4(packed: Tensor) -> Tensor:
    return rows_of((from_nibbles(packed[..., _STEP:]) - 8) * _steps(packed))


INTEGERS = (
    StorageForm("i4", torch.uint8, GROUP, _STEP + 512, _encode_i4, _decode_i4, header=4),
    StorageForm("i8", torch.uint8, GROUP, _STEP + 1024, _encode_i8, _decode_i8, header=4),
)
