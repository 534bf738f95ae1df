"""`ir.rotation` against the way models write it, and the op that rotates."""

from __future__ import annotations

import pytest
import torch
from tree_cases import Case

from treespec_compiler.ir import ops
from treespec_compiler.ir.rotation import rotate

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


def test_attention_that_rotates_is_wellformed() -> None:
    case = Case([(5, [-1, 0, 0], 2), (3, [-1, 0], 2)])
    turn = {"cos": torch.randn(4, 16), "sin": torch.randn(4, 16), "rotary": 32}
    torch.library.opcheck(ops.tree_attention, case.arguments(), turn)
    torch.library.opcheck(ops.tree_attention, case.arguments(), {**turn, "style": "interleaved", "softcap": 2.0})


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_attention_that_rotates_is_rotation_then_attention(style: str) -> None:
    case = Case([(5, [-1, 0, 0], 2), (3, [-1, 0], 2)], window=3)
    cos, sin = torch.randn(4, 8), torch.randn(4, 8)
    mine, theirs = case.arguments(), case.arguments()
    turned = (rotate(x, cos, sin, style, 16) for x in theirs[:2])
    want = ops.tree_attention(*turned, *theirs[2:], softcap=2.0)
    got = ops.tree_attention(*mine, softcap=2.0, cos=cos, sin=sin, style=style, rotary=16)
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(mine[3:5], theirs[3:5]))
