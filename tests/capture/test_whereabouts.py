"""What is where it was is known at a glance; whatever changes a digest is seen, and nothing is kept alive."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from treespec_compiler.capture.code import code_digest
from treespec_compiler.capture.python_state import PythonState
from treespec_compiler.capture.whereabouts import Whereabouts

SCALE = 2.0
NAMES = [
    *(
        "forward",
        "layers",
        "scale",
        "options",
        "order",
        "chosen",
        "queue",
        "table",
        "numbers",
        "act",
        "held",
        "slotted",
    ),
    *("SCALE", "factor", "work", "bias"),
]


class Slotted:
    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 3


class Held:
    def __init__(self) -> None:
        self.factor = 1.5


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.work = nn.Linear(4, 4)
        self.scale = 1000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.work(x) * self.scale * SCALE


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.options = {"a": 1, "b": [1, 2]}
        self.order = OrderedDict(x=1, y=2)
        self.chosen = {1, 2}
        self.queue = deque([1, 2])
        self.numbers = np.arange(3)
        self.act = self._closure(5)
        self.held = Held()
        self.slotted = Slotted()
        self.register_buffer("table", torch.ones(3))

    def _closure(self, number: int) -> Callable[[Any], Any]:
        def act(x: Any, by: int = 2) -> Any:
            return x * number * by

        return act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.act(layer(x))
        return x


def looked(model: nn.Module) -> tuple[str, Whereabouts]:
    traced = [code_digest(f.__code__) for f in (Model.forward, Layer.forward, model.act)]  # type: ignore[attr-defined]
    whereabouts = Whereabouts(model)
    return PythonState({"model": model}, traced, NAMES, whereabouts).structure, whereabouts


def _set_cell(model: Any) -> None:
    model.act.__closure__[0].cell_contents = 6


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a number": lambda m: setattr(m.layers[1], "scale", 1001),
    "an attribute that comes": lambda m: setattr(m.layers[0], "factor", 1),
    "an attribute that goes": lambda m: delattr(m.layers[0], "scale"),
    "a layer less": lambda m: m.layers.pop(-1),
    "a layer more": lambda m: m.layers.append(Layer()),
    "another layer": lambda m: m.layers.__setitem__(0, nn.Identity()),
    "a value in a dict": lambda m: m.options.update(a=2),
    "a value deep in a dict": lambda m: m.options["b"].append(3),
    "the order of a dict": lambda m: m.order.move_to_end("x"),
    "a set": lambda m: m.chosen.add(3),
    "a queue": lambda m: m.queue.rotate(1),
    "numbers in place": lambda m: m.numbers.__setitem__(0, 9),
    "what a closure holds": _set_cell,
    "a default": lambda m: setattr(m.act, "__defaults__", (3,)),
    "code": lambda m: setattr(m.act, "__code__", m._closure(1).__code__.replace(co_consts=(None, 1))),
    "an attribute of an object": lambda m: setattr(m.held, "factor", 2.5),
    "a slot": lambda m: setattr(m.slotted, "factor", 4),
    "the mode": lambda m: m.layers[0].eval(),
    "a hook": lambda m: m.layers[0].work.register_forward_hook(lambda *_: None),
    "a bias less": lambda m: m.layers[0].work.register_parameter("bias", None),
    "a dtype": lambda m: m.layers[0].work.double(),
    "a class": lambda m: setattr(m.layers[0], "__class__", Model),
    "strides": lambda m: setattr(m, "table", torch.ones(3, 2)[:, 0]),
    "another buffer in its place": lambda m: m.table.resize_(2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_walk_sees_is_seen_at_a_glance(name: str) -> None:
    model = Model()
    before, whereabouts = looked(model)
    assert whereabouts.known and whereabouts.same(model)
    CHANGES[name](model)
    assert not whereabouts.same(model)
    try:
        assert looked(model)[0] != before or name == "code"
    except AttributeError:
        assert name == "a class"  # what is now no layer has nothing to walk over


def test_globals_and_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    _, whereabouts = looked(model)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert not whereabouts.same(model)
    _, whereabouts = looked(model)
    monkeypatch.setattr(Layer, "factor", 1, raising=False)
    assert not whereabouts.same(model)
    _, whereabouts = looked(model)
    monkeypatch.setattr(Layer, "forward", nn.Identity.forward)
    assert not whereabouts.same(model)


def test_values_of_tensors_are_no_part_of_it() -> None:
    model = Model()
    _, whereabouts = looked(model)
    with torch.no_grad():
        model.layers[0].work.weight.zero_()
        model.table.zero_()
    assert whereabouts.same(model)


def test_it_is_of_one_model() -> None:
    model, other = Model(), Model()
    _, whereabouts = looked(model)
    assert not whereabouts.same(other)


def test_no_model_is_kept_alive() -> None:
    model = Model()
    _, whereabouts = looked(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and whereabouts.known


@pytest.mark.parametrize("kind", ["method", "reference", "attribute"])
def test_a_model_that_refers_to_itself_is_walked_over_each_time(kind: str) -> None:
    model = Model()
    if kind == "method":
        model.held = model.forward  # type: ignore[assignment]
    elif kind == "reference":
        model.held = weakref.ref(model)  # type: ignore[assignment]
    else:
        model.layers[0].__dict__["held"] = model
    _, whereabouts = looked(model)
    assert not whereabouts.known and not whereabouts.same(model)
