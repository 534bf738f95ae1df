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
