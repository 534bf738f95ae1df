"""What a mask is, decided from its closed form: windows, causal masks, buffers, and what is none of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from modules import CONTEXT, VOCAB, Tiny
from oracles import EAGER, assert_decodes
from torch import Tensor
from zoo import spread

import treespec_compiler as treespec

Mask = Callable[[Tensor, Tensor], Tensor]  # (q [T, 1], k [1, T]) -> [T, T]


def program_with(mask: Mask) -> Any:
    class Masked(Tiny):
        layers = 1

        def mask(self, tokens: int) -> Tensor:
            steps = torch.arange(tokens)
            return mask(steps[:, None], steps[None, :])

    torch.manual_seed(0)
    model = spread(Masked())
    return model, treespec.tree_program(model, options=EAGER)


WINDOWS: dict[str, tuple[Mask, int]] = {
    "causal": (lambda q, k: k <= q, 0),
    "strictly later hidden": (lambda q, k: ~(q < k), 0),
    "shifted both": (lambda q, k: k + 3 < q + 4, 0),
    "doubled": (lambda q, k: 2 * k <= 2 * q + 1, 0),
    "window": (lambda q, k: (k <= q) & (k > q - 5), 5),
    "window by difference": (lambda q, k: (q - k >= 0) & (q - k <= 4), 5),
    "window of one": (lambda q, k: k == q, 1),
    "window wider than the trace": (lambda q, k: (k <= q) & (q - k < 33), 33),
    "window in fours": (lambda q, k: (k <= q) & (4 * (q - k) < 17), 5),
    "window by two maskings": (
        lambda q, k: torch.zeros(1).masked_fill(k > q, float("-inf")).masked_fill(q - k > 6, -1e30),
        7,
    ),
    "added masks": (lambda q, k: torch.where(k > q, -1e9, 0.0) + torch.where(q - k >= 3, -1e9, 0.0), 3),
    "half precision zeros": (lambda q, k: torch.where(k <= q, 0.0, -1e30).to(torch.bfloat16).float(), 0),
}


@pytest.mark.family
@pytest.mark.parametrize("name", WINDOWS)
def test_window(name: str) -> None:
    mask, window = WINDOWS[name]
    model, program = program_with(mask)
    assert program.sites[0].mask.window == window
    assert_decodes(model, program, VOCAB, rounds=1, prompt=20)


def test_a_bias_that_all_seen_keys_share_is_none() -> None:
    model, program = program_with(lambda q, k: torch.where(k <= q, 1.0, float("-inf")))
    assert not program.sites[0].bias
    assert_decodes(model, program, VOCAB, rounds=1, prompt=20)


@pytest.mark.parametrize(
    ("mask", "formula"),
    [
        (lambda q, k: (k <= q) & ((q - k) % 2 == 0), "(q - k) % 2 == 0"),
        (lambda q, k: (k <= q) & ((q - k < 4) | (q - k > 12)), "(q - k >= 13) | (q - k < 4)"),
        (lambda q, k: (k <= q) & ((q - k < 4) | (k < 2)), "(k <= 1) | (q - k < 4)"),
    ],
)
def test_another_predicate_of_positions(mask: Mask, formula: str) -> None:
    model, program = program_with(mask)
    assert program.sites[0].mask.formula == f"k <= q and {formula}"
    assert_decodes(model, program, VOCAB, rounds=1, prompt=20)


REFUSED: dict[str, tuple[Mask, str]] = {
    "everything": (lambda q, k: k + q >= 0, "bidirectional attention: every query sees every key"),
    "all later": (lambda q, k: k >= q, "every later token"),
    "one later": (lambda q, k: k <= q + 1, "1 later token"),
    "not itself": (lambda q, k: k < q, "off-by-one"),
    "nothing": (lambda q, k: (k < q) & (k > q), "hides everything"),
    "mirrored": (lambda q, k: k + q <= 8, "distance"),
    "fractions": (lambda q, k: (q * 0.1 - k * 0.1 < 0.3) & (k <= q), "fractions"),
    "small bias": (lambda q, k: torch.where(k <= q, 0.0, -30.0), "bias|scores change"),
    "not itself now and then": (lambda q, k: (k <= q) & ((q - k < 4) & (k % 5 != 0)), "distance"),
    "a prefix that is seen as a whole": (lambda q, k: (k <= q) | (k < 4), "the first queries see later tokens"),
}


@pytest.mark.family
@pytest.mark.parametrize("name", REFUSED)
def test_no_mask_of_a_decoder(name: str) -> None:
    mask, words = REFUSED[name]
    with pytest.raises(treespec.Unsupported, match=words):
        program_with(mask)


def _buffered(make: Callable[[Tensor], Tensor], size: int = CONTEXT) -> Any:
    class Buffered(Tiny):
        layers = 1

        def setup(self) -> None:
            steps = torch.arange(size)
            self.register_buffer("seen", make(steps[:, None] - steps[None, :]))

        def mask(self, tokens: int) -> Tensor:
            return self.seen[:tokens, :tokens]

    torch.manual_seed(0)
    model = spread(Buffered())
    return model, treespec.tree_program(model, options=EAGER)


@pytest.mark.family
@pytest.mark.parametrize("window", [1, 3, 30, CONTEXT - 1])
def test_banded_buffer(window: int) -> None:
    model, program = _buffered(lambda d: (d >= 0) & (d < window))
    assert program.sites[0].mask.window == window
    assert_decodes(model, program, VOCAB, rounds=1, prompt=40)


def test_a_buffer_bounds_the_context() -> None:
    _, program = _buffered(lambda d: d >= 0, size=24)
    assert program.max_context in (23, 24) and program.sites[0].mask.window == 0


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda d: (d >= 0) & (d != 40), "gap"),
        (lambda d: d >= -1, "later token"),
        (lambda d: torch.rand(d.shape) > 0.5, "distance|bias"),
        (lambda d: torch.where(d >= 0, 0.0, -3.0), "bias"),
    ],
    ids=["far gap", "one later", "random", "bias"],
)
def test_buffer_refused(make: Callable[[Tensor], Tensor], words: str) -> None:
    with pytest.raises(treespec.Unsupported, match=words):
        _buffered(make)
