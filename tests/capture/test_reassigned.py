"""Forward passes that assign a buffer to a module: what it held already is no change, anything else is refused."""

from __future__ import annotations

import pytest
import torch
from modules import CONTEXT, DIM, VOCAB, Tiny
from oracles import EAGER, assert_decodes
from pass_cases import captured
from torch import Tensor, nn
from zoo import spread

import treespec_compiler as treespec


class Moved(Tiny):
    """A table that is sent to the device of the input in every call, as a marked buffer."""

    def setup(self) -> None:
        self.table = nn.Buffer(torch.randn(CONTEXT, DIM), persistent=False)

    def positions(self, ids: Tensor) -> Tensor:
        self.table = self.table.to(device=ids.device, dtype=self.embed.weight.dtype)
        return self.table[torch.arange(ids.shape[1])]


class MovedPlain(Moved):
    """The same with a buffer that was registered."""

    def setup(self) -> None:
        self.register_buffer("table", torch.randn(CONTEXT, DIM))


class Swapped(Tiny):
    """Two tables that take turns: the next call is another function."""

    def setup(self) -> None:
        self.table = nn.Buffer(torch.randn(CONTEXT, DIM))
        self.other = nn.Buffer(torch.randn(CONTEXT, DIM))

    def positions(self, ids: Tensor) -> Tensor:
        found = self.table[torch.arange(ids.shape[1])]
        self.table, self.other = self.other, self.table
        return found


class Scaled(Moved):
    """What is assigned is another value."""

    def positions(self, ids: Tensor) -> Tensor:
        self.table = self.table * 0.5
        return self.table[torch.arange(ids.shape[1])]


def build(cls: type[Tiny]) -> nn.Module:
    torch.manual_seed(0)
    return spread(cls()).eval()


@pytest.mark.parametrize("cls", [Moved, MovedPlain])
def test_assigning_what_is_there_changes_nothing(cls: type[Tiny]) -> None:
    model = build(cls)
    table = model.table
    program = treespec.tree_program(model, options=EAGER)
    assert model.table is table and isinstance(model.table, nn.Buffer) == (cls is Moved)
    assert_decodes(model, program, VOCAB, rounds=2)


@pytest.mark.parametrize(
    ("cls", "words"), [(Swapped, "a second call takes another branch"), (Scaled, "a second call takes another branch")]
)
def test_another_value_is_refused(cls: type[Tiny], words: str) -> None:
    with pytest.raises(treespec.Unsupported, match=words):
        treespec.tree_program(build(cls), options=EAGER)


@pytest.mark.rare
def test_marks_of_buffers_survive_a_failed_trace() -> None:
    class Broken(Moved):
        def finish(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return self.head(x)

    model = build(Broken)
    with pytest.raises(treespec.Unsupported):
        captured(model)
    assert isinstance(model.table, nn.Buffer)


class Counting(Tiny):
    """Another function from the second call on, by an attribute that is no tensor."""

    def setup(self) -> None:
        self.calls = 0

    def finish(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.head(x) * 2 if self.calls > 1 else self.head(x)


def test_a_second_call_that_does_something_else() -> None:
    with pytest.raises(treespec.Unsupported, match="a second call takes another branch"):
        treespec.tree_program(build(Counting), options=EAGER)


class ScaledOnce(Tiny):
    """The first run in evaluation scales a weight and says so, as RWKV's does."""

    def setup(self) -> None:
        self.scaled = False

    def forward(self, ids: Tensor) -> Tensor:
        if not self.scaled:
            with torch.no_grad():
                self.embed.weight.div_(2)
            self.scaled = True
        return super().forward(ids)


def test_weights_that_a_first_run_scales_are_not_scaled_again() -> None:
    """Whether forward fills an attribute again is looked at by running it with the attribute as it begins."""
    torch.manual_seed(1)
    model = ScaledOnce()
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))
    before = model.embed.weight.detach().clone()
    program = treespec.tree_program(model, options=EAGER)
    assert model.scaled and torch.equal(model.embed.weight, before)
    assert_decodes(model, program, VOCAB, rounds=1)


def test_one_that_was_not_run_yet_is_refused() -> None:
    model = ScaledOnce()
    before = model.embed.weight.detach().clone()
    with pytest.raises(treespec.Unsupported, match=r"changes state in place: embed\.weight"):
        treespec.tree_program(model, options=EAGER)
    assert not model.scaled and torch.equal(model.embed.weight, before)
