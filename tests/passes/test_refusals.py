"""Refusals name the node, the user's line and the reason; guards become bounds or mean nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from modules import CONTEXT, DIM, VOCAB, NanoGPT, Tiny
from oracles import EAGER, assert_decodes
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention
from zoo import spread

import treespec_compiler as treespec
from treespec_compiler import TokenTree
from treespec_compiler.errors import ContextOverflow


def refusal(model: nn.Module) -> treespec.Unsupported:
    with pytest.raises(treespec.Unsupported) as caught:
        treespec.tree_program(model, options=EAGER)
    return caught.value


class Bidirectional(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return scaled_dot_product_attention(q, k, v)  # here


class Strict(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        steps = torch.arange(q.shape[2])
        seen = steps[None, :] < steps[:, None]
        return scaled_dot_product_attention(q, k, v, seen)  # here


class OneFuture(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        steps = torch.arange(q.shape[2])
        seen = steps[None, :] <= steps[:, None] + 1
        return scaled_dot_product_attention(q, k, v, seen)  # here


class Convolution(Tiny):
    def setup(self) -> None:
        self.conv = nn.Conv1d(DIM, DIM, 3, padding=1)

    def finish(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x.transpose(1, 2)).transpose(1, 2))  # here


class Cumulative(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x.cumsum(1))  # here


class Rolled(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x.roll(1, 1))  # here


class OverHeads(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)  # here


class JoinedPositions(Tiny):
    def positions(self, ids: Tensor) -> Tensor:
        later = torch.arange(ids.shape[1] - 1)  # here
        return self.wpe(torch.cat([torch.zeros(1, dtype=torch.int64), later]))


class ReducedPositions(Tiny):
    def positions(self, ids: Tensor) -> Tensor:
        steps = torch.arange(ids.shape[1]).float()
        return self.wpe.weight[0] * (steps / steps.max())[:, None]  # here


class CentredPositions(Tiny):
    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(torch.arange(ids.shape[1]) - ids.shape[1] + CONTEXT)  # here


class Random(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x + torch.rand_like(x))  # here


class LengthAsNumber(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x) * x.shape[1]  # here


class TrainingDropout(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(dropout(x, 0.1))  # here


class FewTokensOut(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x[:, -2:])  # here


class GraphBreak(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()  # here
        return self.head(x)


WHERE: list[tuple[type[Tiny], str, str]] = [
    # model, words of the reason, words of the node
    (Bidirectional, "bidirectional", "attention"),
    (Strict, "off-by-one", "attention"),
    (OneFuture, "1 later token", "attention"),
    (Convolution, "looks ahead by 1", "aten.conv1d"),
    (Cumulative, "aten.cumsum mixes tokens", "aten.cumsum"),
    (Rolled, "aten.roll mixes tokens", "aten.roll"),
    (OverHeads, "not the tokens", "scaled_dot_product_attention"),
    (JoinedPositions, "must be one whole dimension", ""),
    (ReducedPositions, "total number of tokens", "mul"),
    (CentredPositions, "number of tokens", ""),
    (Random, "random", "rand_like"),
    (LengthAsNumber, "number of tokens is used as a number", "aten.mul"),
    (TrainingDropout, "dropout is active", "dropout"),
    (FewTokensOut, "", ""),
    (GraphBreak, "one graph", ""),
]


@pytest.mark.family
@pytest.mark.parametrize("cls, reason, node", WHERE, ids=[w[0].__name__ for w in WHERE])
def test_refusal_names_node_line_and_reason(cls: type[Tiny], reason: str, node: str) -> None:
    error = refusal(cls())
    assert reason in error.reason
    if node:
        assert error.node is not None and node in error.node
    assert error.source is not None and "test_refusals.py:" in error.source and "# here" in error.source
    text = str(error)
    assert text.startswith("treespec cannot convert this model") and "way out:" in text and error.reason in text


def test_no_attention_at_all() -> None:
    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(VOCAB, VOCAB)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids)

    assert "no attention" in refusal(Bigram()).reason


def test_training_mode() -> None:
    error = refusal(NanoGPT().train())
    assert "training mode" in error.reason and error.way_out == "call model.eval() first"
    assert error.source is not None and "self.drop(" in error.source


def test_state_changed_in_place() -> None:
    class Counter(Tiny):
        def setup(self) -> None:
            self.register_buffer("calls", torch.zeros(()))

        def finish(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.head(x)

    error = refusal(Counter())
    assert "in place" in error.reason and "calls" in error.reason


def test_subclass_parameters_are_named() -> None:
    class Quantized(Tensor):
        pass

    model = Tiny()
    model.register_buffer("packed", torch.zeros(3).as_subclass(Quantized))
    error = refusal(model)
    assert error.node == "packed" and "Quantized" in error.reason


def test_mask_of_token_content() -> None:
    class Padding(Tiny):
        def forward(self, ids: Tensor) -> Tensor:
            steps = torch.arange(ids.shape[1])
            seen = (steps[None, :] <= steps[:, None])[None, None] & (self.embed(ids)[..., 0] > 0)[:, None, None, :]
            q, k, v = (self.split(p) for p in self.qkv[0](self.start(ids)).chunk(3, -1))
            return self.finish(self.join(scaled_dot_product_attention(q, k, v, seen)))

    assert "content of the tokens" in refusal(Padding()).reason


# Guards


class Windowed(Tiny):
    """Windowed from 30 tokens on: the trace is too short to show it."""

    def mask(self, tokens: int) -> Tensor:
        steps = torch.arange(tokens)
        seen = steps[None, :] <= steps[:, None]
        if tokens >= 30:
            seen = seen & (steps[:, None] - steps[None, :] < 8)
        return seen


@pytest.mark.rare
def test_a_window_the_trace_was_too_short_to_show() -> None:
    error = refusal(Windowed())
    assert "branches on the number of tokens" in error.reason and "30 tokens" in error.reason
    assert error.way_out is not None and "'max_context': 29" in error.way_out


def test_the_way_out_works() -> None:
    torch.manual_seed(0)
    model = spread(Windowed())
    program = treespec.tree_program(model, options={**EAGER, "max_context": 29})
    assert program.max_context == 29
    cache = program.new_cache(64)
    program.prefill(list(range(20)), cache)
    program.verify(TokenTree.chain(range(9)), cache)
    with pytest.raises(ContextOverflow, match="29"):
        program.verify(TokenTree.chain(range(10)), cache)


@pytest.mark.rare
def test_an_assertion_becomes_the_context() -> None:
    class Asserts(Tiny):
        def start(self, ids: Tensor) -> Tensor:
            assert ids.shape[1] <= 40, "too long"
            return super().start(ids)

    torch.manual_seed(0)
    model = spread(Asserts())
    program = treespec.tree_program(model, options=EAGER)
    assert program.max_context == 40
    cache = program.new_cache(64)
    program.prefill(list(range(20)) * 2, cache)
    with pytest.raises(ContextOverflow, match="40"):
        program.verify(TokenTree([1], [-1]), cache)
    assert_decodes(model, program, VOCAB, rounds=1)


def test_a_branch_that_means_nothing_is_converted() -> None:
    class Same(Tiny):
        def finish(self, x: Tensor) -> Any:
            return self.head(x) if x.shape[1] > 25 else self.head(x)  # noqa: RUF034

    torch.manual_seed(0)
    model = spread(Same())
    assert_decodes(model, treespec.tree_program(model, options=EAGER), VOCAB, rounds=1, prompt=30)


def test_constants_of_the_two_sides_are_compared() -> None:
    class OtherConstant(Tiny):
        def finish(self, x: Tensor) -> Any:
            scale = torch.tensor([2.0]) if x.shape[1] > 25 else torch.tensor([1.0])
            return self.head(x * scale)

    assert "26 tokens" in refusal(OtherConstant()).reason


def test_a_condition_that_is_not_linear() -> None:
    class EverySixteen(Tiny):
        def finish(self, x: Tensor) -> Any:
            return self.head(x) * 2 if x.shape[1] % 16 == 0 else self.head(x)

    assert "16 tokens" in refusal(EverySixteen()).reason


def test_a_branch_on_one_token() -> None:
    class Decoding(Tiny):
        def finish(self, x: Tensor) -> Any:
            return self.head(x) + 1 if x.shape[1] == 1 else self.head(x)

    assert "one token" in refusal(Decoding()).reason


def test_alibi_as_a_bias_is_converted_or_refused() -> None:
    class Alibi(Tiny):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            steps = torch.arange(q.shape[2])
            gap = steps[None, :] - steps[:, None]
            bias = (gap * 0.25).masked_fill(gap > 0, float("-inf"))
            return scaled_dot_product_attention(q, k, v, bias)

    torch.manual_seed(0)
    model = spread(Alibi())
    try:
        program = treespec.tree_program(model, options=EAGER)
    except treespec.Unsupported as error:
        assert "bias" in error.reason
    else:
        assert_decodes(model, program, VOCAB, rounds=2)
