"""Rotation of q and k by position, as attention's optional arguments cos, sin, style and rotary say it.

The first `rotary` numbers of a head are turned in pairs, by an angle of each token:

    half          numbers d and d + rotary / 2 are a pair (Su et al. as in GPT-NeoX and Llama)
    interleaved   numbers 2 d and 2 d + 1 are (as in GPT-J)

    x_first, x_second <- x_first cos - x_second sin,  x_second cos + x_first sin
"""

from __future__ import annotations

import torch
from torch import Tensor

STYLES = ("half", "interleaved")


def columns(style: str, rotary: int) -> list[int]:
    """Which angle turns each of the first `rotary` numbers; angles are numbered 0 .. rotary / 2 - 1."""
    half = rotary // 2
    return [d % half if style == "half" else d // 2 for d in range(rotary)]


def partners(style: str, rotary: int) -> list[int]:
    """The other number of each one's pair; the first of a pair takes its partner's sine with a minus."""
    half = rotary // 2
    return [(d + half) % rotary if style == "half" else d ^ 1 for d in range(rotary)]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, style: str, rotary: int) -> Tensor:
    """x [1, H, T, D] turned, computed in float32 at least.

    cos and sin [T, rotary], one column a number, or [T, rotary / 2], one an angle.
    """
    check(cos, sin, style, rotary, x.shape[3])
    other = torch.tensor(partners(style, rotary), device=x.device)
    if cos.shape[1] != rotary:
        angle = torch.tensor(columns(style, rotary), device=x.device)
        cos, sin = cos[:, angle], sin[:, angle]
    wide = torch.promote_types(x.dtype, torch.float32)
    turned = x[..., :rotary].to(wide)
    place = torch.arange(rotary, device=x.device)
    sign = torch.where(place < other, -1.0, 1.0).to(wide)
    turned = turned * cos.to(wide) + sign * turned[..., other] * sin.to(wide)
    return torch.cat([turned.to(x.dtype), x[..., rotary:]], -1)


def check(cos: Tensor, sin: Tensor, style: str, rotary: int, dim: int) -> None:
    if style not in STYLES:
        raise ValueError(f"got style {style!r}, expected one of {', '.join(STYLES)}")
    widths = (rotary, rotary // 2)
    if rotary < 2 or rotary % 2 or rotary > dim or cos.shape[1] not in widths or cos.shape != sin.shape:
        raise ValueError(
            f"got rotary={rotary} of {dim} numbers, cos {list(cos.shape)} and sin {list(sin.shape)}, expected an even "
            "rotary of at most the head's size, and as many columns or half as many"
        )
