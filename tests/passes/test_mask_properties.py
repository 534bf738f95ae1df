"""Random compositions of windows, chunks and ALiBi, in random spellings, built as graphs and decoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from families import some_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from modules import CONTEXT, HEADS, VOCAB, Tiny
from oracles import EAGER, assert_decodes
from torch import Tensor
from zoo import spread

import treespec_compiler as treespec

Predicate = Callable[[Tensor, Tensor], Tensor]  # (q [T, 1], k [1, T]) -> [T, T], true where a key is seen
PROMPT = 30

CAUSAL: list[Predicate] = [lambda q, k: k <= q, lambda q, k: ~(k > q), lambda q, k: q - k >= 0, lambda q, k: k < q + 1]
WINDOW: list[Callable[[int], Predicate]] = [
    lambda w: lambda q, k: q - k < w,
    lambda w: lambda q, k: k > q - w,
    lambda w: lambda q, k: ~(k <= q - w),
    lambda w: lambda q, k: 2 * (q - k) <= 2 * w - 1,
]
CHUNK: list[Callable[[int], Predicate]] = [
    lambda c: lambda q, k: q // c == k // c,
    lambda c: lambda q, k: ~(torch.div(q, c, rounding_mode="floor") != torch.div(k, c, rounding_mode="floor")),
]


def _conjunction(parts: list[Predicate], q: Tensor, k: Tensor) -> Tensor:
    seen = parts[0](q, k)
    for part in parts[1:]:
        seen = seen & part(q, k)
    return seen


def _boolean(parts: list[Predicate], q: Tensor, k: Tensor) -> Tensor:
    return _conjunction(parts, q, k)


def _filled(parts: list[Predicate], q: Tensor, k: Tensor) -> Tensor:
    mask = torch.zeros(1, 1)
    for part in parts:
        mask = mask.masked_fill(~part(q, k), float("-inf"))
    return mask


def _chosen(parts: list[Predicate], q: Tensor, k: Tensor) -> Tensor:
    return torch.where(_conjunction(parts, q, k), 0.0, torch.finfo(torch.float32).min)


HIDING = [_boolean, _filled, _chosen]
SLOPES: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
    lambda slopes, q, k: slopes * (k - q),
    lambda slopes, q, k: -(slopes * (q - k)),
    lambda slopes, q, k: slopes * k,  # a softmax does not see slope * q
]


@st.composite
def masks(draw: Any) -> tuple[int, bool, Callable[[Tensor, Tensor], Tensor], list[Predicate]]:
    """(window, whether there is ALiBi, the module's mask, the predicates it is made of)."""
    window = draw(st.one_of(st.just(0), st.integers(1, PROMPT + 12)))
    chunk = draw(st.one_of(st.just(0), st.integers(2, PROMPT)))
    parts = [draw(st.sampled_from(CAUSAL))]
    parts += [draw(st.sampled_from(WINDOW))(window)] if window else []
    parts += [draw(st.sampled_from(CHUNK))(chunk)] if chunk else []
    parts = draw(st.permutations(parts))
    alibi = draw(st.sampled_from([None, *SLOPES]))
    hiding = draw(st.sampled_from(HIDING[1:] if alibi else HIDING))

    def mask(q: Tensor, k: Tensor) -> Tensor:
        hidden = hiding(parts, q, k)
        if alibi is None:
            return hidden
        slopes = (2.0 ** -(torch.arange(HEADS) + 1.0)).view(HEADS, 1, 1)
        return hidden + alibi(slopes, q, k)

    return window, alibi is not None, mask, parts


def _alone(q: Tensor, k: Tensor) -> Tensor:
    """ALiBi where every token sees itself alone."""
    return _filled([CAUSAL[0], WINDOW[0](1)], q, k) + SLOPES[0](torch.ones(HEADS, 1, 1), q, k)


@settings(max_examples=len(some_of(range(72))))
@given(masks())
@example((1, True, _alone, [CAUSAL[0], WINDOW[0](1)]))
def test_random_compositions_are_proved_and_decode(drawn: Any) -> None:
    window, alibi, mask, parts = drawn

    class Masked(Tiny):
        layers = 1

        def mask(self, tokens: int) -> Tensor:
            steps = torch.arange(tokens)
            return mask(steps[:, None], steps[None, :])

    torch.manual_seed(0)
    model = spread(Masked())
    program = treespec.tree_program(model, options=EAGER)
    (site,) = program.sites
    q, k = torch.arange(CONTEXT)[:, None], torch.arange(CONTEXT)[None, :]
    assert torch.equal(site.mask.visible(q, k), _conjunction(parts, q, k))
    # a token that sees itself alone has no distance for a slope
    assert site.bias == ("slope_h * (k - q)" if alibi and window != 1 else "")
    assert_decodes(model, program, VOCAB, rounds=1, prompt=PROMPT)
