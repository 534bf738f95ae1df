"""The module as the target of its program: with the rounded weights, where `weights="int8"` or `"int4"` rounds them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import InvalidOption
from ..ir.stored_weights import Quantized
from ..ir.weights import Expression, Source
from ..passes.framework.state import GraphState


class RoundedModel:
    """Made once for several runs: it holds the rounded weights, in float32. Nothing, where none is rounded."""

    def __init__(self, model: nn.Module, state: GraphState) -> None:
        self._model, read = model, state.weights.read
        self._rounded: dict[int, tuple[Tensor, Tensor]] = {}
        self._names: dict[int, str] = {}
        for made in rounded(state):
            assert isinstance(made.of, Source)
            own = read(made.of.name)
            self._rounded[id(own)] = own, _like(own, made.build(read))
            self._names[id(own)] = made.of.name

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """Within it the module reads the rounded weights, wherever it holds one of them.

        NOTE a program that runs meanwhile takes them for the module's own, and packs anew; rounding twice changes
        nothing. Raises InvalidOption where a weight is in a list or a closure: it could not be exchanged.
        """
        held: list[tuple[dict[str, Any], str, Tensor]] = []
        for module in self._model.modules() if self._rounded else ():
            for table in _tables(module):
                held += [(table, key, value) for key, value in table.items() if id(value) in self._rounded]
        lost = self._rounded.keys() - {id(own) for _, _, own in held}
        if lost:
            raise _not_held(self._names[lost.pop()])
        try:
            for table, key, own in held:
                table[key] = self._rounded[id(own)][1]
            yield
        finally:
            for table, key, own in held:
                table[key] = own


def as_target(model: nn.Module, state: GraphState) -> contextlib.AbstractContextManager[None]:
    """`RoundedModel.run` for one run."""
    return RoundedModel(model, state).run()


def rounded(state: GraphState) -> list[Quantized]:
    """Weights of the graph that were rounded, each once."""
    found: dict[Quantized, None] = {}

    def look(made: Expression) -> None:
        if isinstance(made, Quantized):
            found[made] = None
        for part in made.parts:
            look(part)

    for made in (*state.weights.values(), *state.weights.streamed.values()):
        look(made)
    return [*found]


def _not_held(name: str) -> InvalidOption:
    return InvalidOption(
        name="weights",
        got=f"{name}, which is no attribute of a module",
        expected="parameters, buffers and attributes to round",
        fix="Register it as a parameter or buffer, or leave the weights as they are.",
    )


def _tables(module: nn.Module) -> list[dict[str, Any]]:
    tables: tuple[Any, ...] = (module._parameters, module._buffers, vars(module))
    return [*tables]


def _like(own: Tensor, values: Tensor) -> Tensor:
    return nn.Parameter(values, requires_grad=False) if isinstance(own, nn.Parameter) else values
