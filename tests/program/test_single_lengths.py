"""Numbers of tokens that a forward pass singles out, compared by running the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import EAGER, assert_decodes
from torch import Tensor, nn

import treespec_compiler as treespec
from treespec_compiler.errors import Refusal
from treespec_compiler.program.semantics import lengths_check

VOCAB, TABLE = 50, 64


class Singles(nn.Module):
    """Something else happens at `at` tokens."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, 32), nn.Embedding(TABLE, 32)
        self.qkv, self.head, self.at = nn.Linear(32, 96), nn.Linear(32, VOCAB), at

    def other(self, x: Tensor) -> Tensor:
        return x * 2

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        q, k, v = (y.view(1, -1, 4, 8).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        return self.head(self.other(x) if ids.shape[1] == self.at else x)


class Fails(Singles):
    def other(self, x: Tensor) -> Tensor:
        return x.view(3, 7, -1)


@pytest.mark.parametrize("at", [TABLE + 1, 100])
def test_what_is_beyond_the_context_does_not_count(at):
    """The model itself cannot run so many tokens."""
    model = Singles(at).eval()
    program = treespec.tree_program(model, options=EAGER)
    assert program.max_context == TABLE
    assert_decodes(model, program, VOCAB, rounds=2)


def test_another_branch_within_it_is_refused():
    with pytest.raises(treespec.Unsupported, match="50 tokens takes another branch") as caught:
        treespec.tree_program(Singles(50).eval(), options=EAGER)
    assert caught.value.kind is Refusal.BRANCH


class OneToken(Singles):
    """At one length a single token of many means something else; it is named in the code, or by an attribute."""

    def __init__(self, at: int, vocab: int = 4096, named: int | None = None) -> None:
        super().__init__(at)
        self.tokens, self.head, self.named = nn.Embedding(vocab, 32), nn.Linear(32, vocab), named

    def forward(self, ids: Tensor) -> Tensor:
        self.marked = ids == (4001 if self.named is None else self.named)
        return super().forward(ids)

    def other(self, x: Tensor) -> Tensor:
        return torch.where(self.marked[..., None], -x, x)


@pytest.mark.parametrize("named", [None, 3999], ids=["by the code", "by an attribute"])
def test_a_token_that_means_something_else_at_one_length_is_found(named):
    with pytest.raises(treespec.Unsupported, match="50 tokens takes another branch") as caught:
        treespec.tree_program(OneToken(50, named=named).eval(), options=EAGER)
    assert caught.value.kind is Refusal.BRANCH


@pytest.mark.rare
def test_a_length_that_does_not_run_is_refused():
    with pytest.raises(treespec.Unsupported, match="itself fails on a prompt of 50 tokens") as caught:
        treespec.tree_program(Fails(50).eval(), options=EAGER)
    assert caught.value.kind is Refusal.RAISES


def test_a_model_that_fails_when_a_length_is_compared_is_refused():
    model = Singles(100).eval()
    program = treespec.tree_program(model, options=EAGER)
    program.state.lone_lengths.append(33)
    model.register_forward_pre_hook(lambda module, args: args[0].view(3, 11, 1, -1) if args[0].shape[1] == 33 else None)
    with pytest.raises(treespec.Unsupported, match="fails on a prompt of 33 tokens") as caught:
        lengths_check(model, program._followed.call, program.state)
    assert caught.value.kind is Refusal.RAISES
