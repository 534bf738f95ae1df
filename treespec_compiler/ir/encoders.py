"""Faster ways to a packed weight than `ir.narrow` has, entered by who brings compiled code for one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Encoder = Callable[[Tensor, int, bool, list[tuple[int, int]]], Tensor | None]
"""Of a float32 matrix [N, K], with bits a level, whether its groups have a minimum, and the levels to try of a group's
least and largest value: [panels, blocks, bytes], or None where it cannot tell: `ir.narrow` looks then. Where it gives
something, `ir.narrow` gives the same.
"""

_ENCODERS: dict[str, Encoder] = {}


def register_encoder(device: str, encoder: Encoder) -> None:
    """For weights on devices of this type."""
    _ENCODERS[device] = encoder


def encoder_of(weight: Tensor) -> Encoder | None:
    return _ENCODERS.get(weight.device.type)
