"""What Dynamo's guards leave out is noticed all the same: a program follows it."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from modules import Tiny
from oracles import EAGER, TOLERANCE, eager_row, error
from torch import Tensor, nn
from zoo import spread

import treespec_compiler as treespec
from treespec_compiler.capture.unguarded import MOST_BELOW, _below, _classes_of

VARIABLE = "TREESPEC_TEST_SCALE"
IDS = [3, 1, 4, 1, 5]


class Helper:
    """No module of the model's."""

    def scaled(self, x: Tensor) -> Tensor:
        return self.factor() * x

    def factor(self) -> float:
        return 2.0


class Derived(Helper):
    pass


class Part(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Reader(Tiny):
    layers = 1

    def setup(self) -> None:
        self.helper, self.hidden = Derived(), [Part()]
        self.named: OrderedDict[str, float] = OrderedDict(a=2.0, b=3.0)
        self.number = np.float32(2)

    def __getattr__(self, name: str) -> Any:
        return 2.0 if name == "missing" else super().__getattr__(name)

    def finish(self, x: Tensor) -> Tensor:
        x = self.hidden[0](self.helper.scaled(x).tanh()) * float(os.environ.get(VARIABLE, "1"))
        return self.head(x * next(iter(self.named.values())) * self.missing * self.number + self.wpe.weight[0])


def _forwarded(self: Part, x: Tensor) -> Tensor:
    return x * 3


CHANGES: dict[str, Callable[[Reader, pytest.MonkeyPatch], Any]] = {
    "a variable of the environment": lambda m, patch: patch.setenv(VARIABLE, "3"),
    "a method of an object": lambda m, patch: patch.setattr(Helper, "factor", lambda self: 3.0),
    "a method of a class below": lambda m, patch: patch.setattr(Derived, "factor", lambda self: 3.0, raising=False),
    "a method of a module in a list": lambda m, patch: patch.setattr(Part, "forward", _forwarded),
    "a method of tensors": lambda m, patch: patch.setattr(Tensor, "tanh", lambda x: x * 3, raising=False),
    "the order of a dictionary": lambda m, patch: m.named.move_to_end("a"),
    "an attribute that was found otherwise": lambda m, patch: setattr(m, "missing", 3.0),
    "a number of numpy's": lambda m, patch: setattr(m, "number", np.float32(3)),
}


@pytest.mark.family
@pytest.mark.parametrize("name", CHANGES)
def test_it_is_followed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = spread(Reader()).eval()
    program = treespec.tree_program(model, options=EAGER)
    assert _error(model, program) <= TOLERANCE
    count = program.history
    program.new_cache(8)
    assert program.history is count, "made anew without a change"
    before = eager_row(model, IDS)
    CHANGES[name](model, monkeypatch)
    assert error(eager_row(model, IDS), before) > 1e-3, "the change changes nothing"
    assert _error(model, program) <= TOLERANCE


def _error(model: nn.Module, program: treespec.TreeProgram) -> float:
    return error(program.prefill(IDS, program.new_cache(16)), eager_row(model, IDS))


def test_other_variables_of_the_environment_are_nothing_to_a_model_that_asks_for_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = treespec.tree_program(Tiny(), options=EAGER)
    before = program.history
    monkeypatch.setenv(VARIABLE, "3")
    program.new_cache(8)
    assert program.history is before


def test_classes_are_found_by_their_code() -> None:
    assert _classes_of([Helper.factor.__code__]) == {Helper, Derived}
    assert len(_below(nn.Module)) > MOST_BELOW
    assert nn.Linear not in _classes_of([nn.Module.__call__.__code__, nn.Module._call_impl.__code__])
    assert _classes_of([_forwarded.__code__]) == set()
