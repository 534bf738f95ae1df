"""What a caller passes besides token ids is made for any number of them: by the example's values, or by a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from modules import VOCAB, Tiny
from oracles import EAGER, assert_decodes
from styles import built
from supplies import (
    BY_EXAMPLE,
    BY_FUNCTION,
    FREQS,
    Blocked,
    Called,
    Masked,
    Placed,
    banded,
    blocks,
    blocks_ahead,
    everything,
    placed,
    seen,
)
from torch import Tensor

import treespec_compiler as treespec
from treespec_compiler.errors import Refusal

IDS = torch.arange(9)[None]


@pytest.mark.parametrize(("style", "arguments"), BY_EXAMPLE)
def test_masks_and_positions_of_an_example(style: type[Tiny], arguments: Callable[[Tensor], Any]) -> None:
    model = built(style)
    program = treespec.tree_program(model, arguments(IDS), options=EAGER)
    assert_decodes(Called(model, arguments), program, VOCAB, rounds=1, size=7)


@pytest.mark.family
@pytest.mark.parametrize(("style", "arguments"), BY_FUNCTION)
def test_an_example_that_is_a_function(style: type[Tiny], arguments: Callable[[Tensor], Any]) -> None:
    model = built(style)
    program = treespec.tree_program(model, arguments, options=EAGER)
    assert_decodes(Called(model, arguments), program, VOCAB, rounds=1, size=7)
    assert treespec.tree_program(model, arguments, options=EAGER) is program


def test_a_table_that_the_function_reads_bounds_the_context() -> None:
    assert treespec.tree_program(built(Placed), placed, options=EAGER).max_context == len(FREQS)


def test_a_window_is_not_guessed_from_an_example() -> None:
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(built(Masked), banded(IDS), options=EAGER)
    assert refusal.value.kind is Refusal.SPECIALISED


@pytest.mark.rare
def test_a_block_mask_is_what_its_function_is() -> None:
    model = built(Blocked)
    program = treespec.tree_program(model, blocks(IDS), options=EAGER | {"max_context": 64})
    assert_decodes(Called(model, blocks), program, VOCAB, rounds=1, size=3)
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(built(Blocked), blocks_ahead(IDS), options=EAGER)
    assert refusal.value.kind is Refusal.MASK


def test_a_function_that_shows_everything_is_refused() -> None:
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(built(Masked), everything, options=EAGER)
    assert refusal.value.kind is Refusal.MASK


def test_a_mask_that_is_said_to_be_constant_is_one() -> None:
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(built(Masked), seen(IDS), roles={"mask": "constant"}, options=EAGER)
    assert refusal.value.kind is Refusal.SPECIALISED
