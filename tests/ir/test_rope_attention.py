"""`ir.rope_attention` against the way models write it, and its ops."""

from __future__ import annotations

import pytest
import torch
from tree_cases import Case

from treespec_compiler.ir import ops
from treespec_compiler.ir.rope_attention import rotate

HEADS, TOKENS, DIM = 3, 5, 12


def half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin


@pytest.mark.parametrize("rotary", [DIM, 8, 2])
@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rotate(style: str, rotary: int) -> None:
    x, cos, sin = torch.randn(1, HEADS, TOKENS, DIM), torch.randn(TOKENS, rotary), torch.randn(TOKENS, rotary)
    models = half if style == "half" else interleaved
    want = torch.cat([models(x[..., :rotary], cos, sin), x[..., rotary:]], -1)
    torch.testing.assert_close(rotate(x, cos, sin, style, rotary), want)
    few_cos, few_sin = cos[:, : rotary // 2], sin[:, : rotary // 2]
    every = (
        [torch.cat([c, c], -1) for c in (few_cos, few_sin)]
        if style == "half"
        else [c.repeat_interleave(2, -1) for c in (few_cos, few_sin)]
    )
    same = rotate(x, few_cos, few_sin, style, rotary), rotate(x, *every, style, rotary)
    assert torch.equal(*same)


def test_interleaved_is_a_product_of_complex_numbers() -> None:
    x, angle = torch.randn(1, HEADS, TOKENS, DIM), torch.randn(TOKENS, DIM // 2)
    complex_x = torch.view_as_complex(x.reshape(1, HEADS, TOKENS, -1, 2))
    want = torch.view_as_real(complex_x * torch.polar(torch.ones_like(angle), angle)).flatten(3)
    torch.testing.assert_close(rotate(x, angle.cos(), angle.sin(), "interleaved", DIM), want)


@pytest.mark.parametrize(
    ("style", "rotary", "columns"), [("spiral", 8, 8), ("half", 7, 7), ("half", 16, 16), ("half", 8, 6), ("half", 0, 0)]
)
def test_what_no_rotation_is(style: str, rotary: int, columns: int) -> None:
    x, cos = torch.randn(1, HEADS, TOKENS, DIM), torch.randn(TOKENS, columns)
    with pytest.raises(ValueError, match=r"got style|got rotary"):
        rotate(x, cos, cos, style, rotary)


def test_ops_are_wellformed() -> None:
    case = Case([(5, [-1, 0, 0], 2), (3, [-1, 0], 2)])
    cos = torch.randn(4, 16)
    torch.library.opcheck(ops.rope_tree_attention, (*case.arguments(), cos, cos, "half", 32))
    scored = (*case.arguments(), 0, 0.0, None, None, None, cos, cos, "interleaved", 32)
    torch.library.opcheck(ops.rope_scored_tree_attention, scored)
