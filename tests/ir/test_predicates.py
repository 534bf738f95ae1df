"""Predicates over positions as text."""

from __future__ import annotations

import pytest
import torch

from treespec_compiler.ir.predicates import K, Q, function, parse
from treespec_compiler.ir.specs import MaskSpec


@pytest.mark.parametrize(
    ("text", "sees"),
    [
        ("(k < 4) | (q - k < 8)", lambda q, k: (k < 4) | (q - k < 8)),
        ("(q // 4 == k // 4) & ((k % 3) != 1)", lambda q, k: (q // 4 == k // 4) & (k % 3 != 1)),
        ("~(q >= 2 * k + 3)", lambda q, k: ~(q >= 2 * k + 3)),
    ],
)
def test_text_is_read(text: str, sees) -> None:
    q, k = torch.arange(30)[:, None], torch.arange(30)[None]
    assert torch.equal(function(parse(text), (Q, K))(q, k), sees(q, k))
    mask = MaskSpec(pattern=text)
    assert torch.equal(mask.visible(q, k), sees(q, k) & (k <= q))
    assert mask.sees(9, 7) == bool(sees(torch.tensor(9), torch.tensor(7)))


@pytest.mark.parametrize("text", ["q <", "x < 3", "print(q)", "q ** 2 < 3"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no predicate"):
        parse(text)
