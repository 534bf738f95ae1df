"""How it is shown that what a refusal says to do works."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from modules import Tiny
from torch import nn

Change = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Way:
    """`before` is refused with `words` in the way out; `change` of it, or `options`, makes it convert."""

    before: type[Tiny]
    words: str
    change: Change = lambda model: model
    options: dict[str, Any] = field(default_factory=dict)
    example: Any = None
    then: Any = None
    """The example after the change."""
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    """What stands around the conversion that is refused, and is taken away."""


def becomes(after: type[Tiny]) -> Change:
    """The same weights under other code."""

    def change(model: nn.Module) -> nn.Module:
        other = after()
        other.load_state_dict(model.state_dict())
        return other

    return change


class One(Tiny):
    layers = 1
