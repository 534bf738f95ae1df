"""`treespec::rope_tree_attention` and `treespec::rope_scored_tree_attention`: q and k come before their rotation.

The first `rotary` numbers of a head are turned in pairs, by an angle of each token:

    half          numbers d and d + rotary / 2 are a pair (Su et al. as in GPT-NeoX and Llama)
    interleaved   numbers 2 d and 2 d + 1 are (as in GPT-J)

    x_first, x_second <- x_first cos - x_second sin,  x_second cos + x_first sin
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from . import attention, scored_attention

STYLES = ("half", "interleaved")

_ROPE = ", Tensor cos, Tensor sin, str style, int rotary) ->"
SCHEMA = attention.SCHEMA.replace(") ->", _ROPE)
SCORED_SCHEMA = scored_attention.SCHEMA.replace(") ->", _ROPE)


@dataclass(frozen=True)
class Turn:
    """How an attention site rotates its q and k: what its kernel is compiled for."""

    style: str
    rotary: int
    width: int
    """Columns of cos and sin."""
    dtype: torch.dtype
    """Of cos and sin."""


def turns(graph: fx.Graph) -> dict[int, Turn]:
    """By site: the rotations that are part of attention."""
    found = {}
    for node in graph.nodes:
        if node.target in (rope_tree_attention, rope_scored_tree_attention):
            *_, cos, _, style, rotary = node.args
            value = cos.meta["val"]
            found[node.meta["site"]] = Turn(style, rotary, value.shape[1], value.dtype)
    return found


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


def reference(*args: Any) -> Tensor:
    """The arguments of `treespec::tree_attention`, then cos, sin, style and rotary: rotate q and k, then attend."""
    q, k, *rest, cos, sin, style, rotary = args
    q, k = rotate(q, cos, sin, style, rotary), rotate(k, cos, sin, style, rotary)
    return attention.reference(q, k, *rest)


def scored_reference(*args: Any) -> Tensor:
    """As `reference`, of `treespec::scored_tree_attention`."""
    q, k, *rest, cos, sin, style, rotary = args
    q, k = rotate(q, cos, sin, style, rotary), rotate(k, cos, sin, style, rotary)
    return scored_attention.reference(q, k, *rest)


def fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return attention.empty_output(q, v)


_library = torch.library.Library("treespec", "FRAGMENT")
for _name, _schema, _reference in (
    ("rope_tree_attention", SCHEMA, reference),
    ("rope_scored_tree_attention", SCORED_SCHEMA, scored_reference),
):
    _library.define(_name + _schema, tags=attention.TAGS)
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"treespec::{_name}", fake, lib=_library)

rope_tree_attention: OpOverload = torch.ops.treespec.rope_tree_attention.default
rope_scored_tree_attention: OpOverload = torch.ops.treespec.rope_scored_tree_attention.default
