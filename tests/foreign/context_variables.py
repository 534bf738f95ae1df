"""Decoders that read context variables in forward."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from modules import Tiny
from torch import Tensor

SCALE: ContextVar[Any] = ContextVar("scale", default=2.0)
SCALES: ContextVar[list[float]] = ContextVar("scales")


class ScaledByContext(Tiny):
    layers = 1

    def finish(self, x: Tensor) -> Any:
        return self.head(x * SCALE.get() + SCALE.get(1.5))


class ListInContext(Tiny):
    layers = 1

    def setup(self) -> None:
        SCALES.set([2.0])

    def finish(self, x: Tensor) -> Any:
        return self.head(x * SCALES.get()[0])


class NumberInContext(ListInContext):
    def finish(self, x: Tensor) -> Any:
        return self.head(x * SCALE.get())
