"""Ops that users vouch for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from modules import DIM, Tiny
from oracles import EAGER, assert_decodes
from torch import Tensor

import treespec_compiler as treespec
from treespec_compiler.errors import InvalidOption


@torch.library.custom_op("treespec_test::scale_rows", mutates_args=())
def scale_rows(x: Tensor, gain: Tensor) -> Tensor:
    return x * gain


@scale_rows.register_fake
def _(x: Tensor, gain: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("treespec_test::swap", mutates_args=())
def swap(x: Tensor) -> Tensor:
    """[1, T, C] -> [T, 1, C]"""
    return x.transpose(0, 1).clone()


@swap.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], x.shape[0], x.shape[2])


class Scaled(Tiny):
    def setup(self) -> None:
        self.gain = torch.nn.Parameter(torch.rand(DIM))

    def block(self, x: Tensor, layer: int) -> Tensor:
        return super().block(scale_rows(x, self.gain), layer)


class Swapped(Tiny):
    def block(self, x: Tensor, layer: int) -> Tensor:
        return super().block(swap(x).tanh().transpose(0, 1), layer)


@pytest.fixture(autouse=True)
def _taken_back() -> Iterator[None]:
    yield
    treespec.register_op(scale_rows, token_local=False)
    treespec.register_op(swap, token_local=False)


def test_an_unknown_op_is_refused_and_the_refusal_says_how_to_vouch() -> None:
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(Scaled(), options=EAGER)
    assert "treespec_test.scale_rows is not known to act on each token alone" in refusal.value.reason
    assert "treespec.register_op('treespec_test::scale_rows', token_local=True)" in str(refusal.value.way_out)
    assert "test_custom_ops.py" in str(refusal.value.source)


@pytest.mark.parametrize("op", [scale_rows, "treespec_test::scale_rows", torch.ops.treespec_test.scale_rows.default])
def test_a_registered_op_converts(op: object) -> None:
    treespec.register_op(op, token_local=True)
    model = Scaled()
    assert_decodes(model, treespec.tree_program(model, options=EAGER), 23, rounds=1)


def test_a_rule_says_where_the_tokens_go() -> None:
    treespec.register_op(swap, token_local=lambda dims: 1 - dims[0])
    model = Swapped()
    assert_decodes(model, treespec.tree_program(model, options=EAGER), 23, rounds=1)


def test_a_word_that_the_shapes_contradict_is_refused() -> None:
    treespec.register_op(swap, token_local=True)
    with pytest.raises(treespec.Unsupported, match="must be one whole dimension"):
        treespec.tree_program(Swapped(), options=EAGER)


def test_a_rule_may_refuse() -> None:
    def never(dims: object) -> int:
        raise ValueError("it looks at its neighbours")

    treespec.register_op(swap, token_local=never)
    with pytest.raises(treespec.Unsupported, match="it looks at its neighbours"):
        treespec.tree_program(Swapped(), options=EAGER)


def test_ops_with_a_rule_cannot_be_vouched_for() -> None:
    with pytest.raises(InvalidOption, match=r"aten\.cumsum"):
        treespec.register_op(torch.ops.aten.cumsum, token_local=True)
    with pytest.raises(InvalidOption, match="a custom op"):
        treespec.register_op(len)
    with pytest.raises(InvalidOption, match="token_local"):
        treespec.register_op(swap, token_local="yes")  # type: ignore[arg-type]
