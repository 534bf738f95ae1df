"""Where a module keeps the tensors that a captured graph reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class WeightRef:
    """A parameter, buffer or tensor attribute that the captured graph reads.

    `owner[key]` is where the module keeps it, so a replaced parameter is noticed. `owner` is None for a tensor that is
    no parameter, buffer or attribute of a module (in a list, a closure, a global); `find` then gives the one that the
    model reads now, or None where there is none; it is None itself where nothing can be looked up.
    """

    name: str
    tensor: Tensor
    owner: dict[str, Any] | None = None
    key: str = ""
    find: Callable[[nn.Module], Tensor | None] | None = None
    listed: bool = False
    """Whether a list or dict of the model's holds it (`found.place`)."""
    within: tuple[Any, str, Tensor] | None = None
    """Of a tensor inside of another one, whose attributes are `owner` then: that one, and where the module keeps it."""

    @property
    def place(self) -> tuple[Any, str, Any]:
        """The table of a module's, the key, and what was there: the tensor, or the one that it is in."""
        return (self.owner, self.key, self.tensor) if self.within is None else self.within

    @property
    def inside(self) -> Tensor | None:
        """Of a tensor within another, the one in its place now; None where what it was in is of another kind."""
        assert self.within is not None
        table, key, outer = self.within
        now = getter(table)(key)
        kinds = [(type(t), t.dtype, t.device, t.shape) for t in (now, outer) if isinstance(t, Tensor)]
        return vars(now).get(self.key) if len(kinds) == 2 and kinds[0] == kinds[1] else None

    def follow(self) -> None:
        """Take what a module holds now for what was there."""
        if self.within is not None:
            table, key, _ = self.within
            now = getter(table)(key)
            self.within, self.owner = (table, key, now), vars(now)


def getter(table: Any) -> Callable[[str], Any]:
    """What a module's table holds under a key, or None; a scripted module's table is no dict."""
    if hasattr(table, "get"):
        look: Callable[[str], Any] = table.get
        return look
    return lambda key: table[key] if key in table else None  # noqa: SIM401


def registered(model: nn.Module) -> dict[int, tuple[str, dict[str, Any], str]]:
    """id of each parameter and buffer -> (qualified name, dict that holds it, key)."""
    found: dict[int, tuple[str, dict[str, Any], str]] = {}
    for prefix, module in model.named_modules():
        for table in (module._parameters, module._buffers, vars(module)):
            for key, value in table.items():
                if isinstance(value, Tensor):
                    found.setdefault(id(value), (f"{prefix}.{key}".lstrip("."), table, key))
    return found
