"""Runs of a model that may not write its parameters: one that would, stops in front of the write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .quantized_weights import own_tensors


class WritesParameters(RuntimeError):
    """Forward was about to write a parameter in place."""


class ParametersUnwritten(TorchDispatchMode):
    """Raises `WritesParameters` in place of an op that writes what a parameter of the model holds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.held = {_memory(parameter) for parameter in own_tensors(model.parameters())} - {None, 0}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            given = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
            written = (given.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write)
            if any(map(self._holds, written)):
                raise WritesParameters(f"{func} writes a parameter")
        call: Callable[..., Any] = func
        return call(*args, **kwargs)

    def _holds(self, value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return any(map(self._holds, value))
        return isinstance(value, Tensor) and any(_memory(part) in self.held for part in own_tensors([value]))


def _memory(tensor: Tensor) -> int | None:
    """Where its numbers lie; None: it has none of its own, as a wrapper of other tensors."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return None
