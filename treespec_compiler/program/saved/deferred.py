"""A saved state whose graph is read when something asks for it: what runs compiled code that was kept never does.

Fake tensors, sizes and fx nodes of a few thousand calls take a second to make, and import Dynamo. Names of the inputs
and the kind of the logits are in the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ...errors import TreespecError
from ...ir.registry import kernel_of
from ...passes.framework.state import GraphState
from .state import check_filled, parts_of, read_graph, weights_of
from .values import CannotLoad, device_of, of_name, target_of

Broken = Callable[[Exception], Exception]
"""The error to raise for one of reading."""


class DeferredState(GraphState):
    """`gm`, `length` and `fake_mode` are read together, at the first use of one of them."""

    _read: Callable[[], tuple[fx.GraphModule, Any, Any]] | None = None
    _broken: Broken
    _here: tuple[Any, Any, Any]
    _names: list[str]
    _logits: tuple[torch.dtype, torch.device, int]
    _digest: str

    @classmethod
    def of(
        cls,
        text: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        read: Callable[[str], Tensor],
        broken: Broken,
    ) -> DeferredState | None:
        """As `state_of`; None: the text holds more graphs than one, or logits that its output does not tell.

        What the text calls and which inputs it has is looked at now; `broken` says what is raised when the graph turns
        out to be none.
        """
        weights = weights_of(text, read)
        nodes = text["graph"]["nodes"]
        logits = _logits(nodes)
        if weights is None or logits is None:
            return None
        state = cls(gm=None, length=None, fake_mode=None, weights=weights, **parts_of(text))  # type: ignore[arg-type]
        state._names = [row["name"] for row in nodes if row["op"] == "placeholder"]
        check_filled(state._names, state)
        check_kernels(map(target_of, {row["target"] for row in nodes if row["op"] == "call_function"}))
        state._logits, state._digest = logits, str(text["graph_digest"])
        state._read, state._broken = (lambda: read_graph(text, tensors)), broken
        return state

    def _part(self, index: int) -> Any:
        if self._read is not None:
            read, self._read = self._read, None
            try:
                self._here = read()
            except (CannotLoad, TreespecError, LookupError, TypeError, ValueError, AttributeError) as error:
                self._read = read
                raise self._broken(error) from error
        return self._here[index]

    def _set(self, index: int, value: Any) -> None:
        here = getattr(self, "_here", (None, None, None))
        self._here = (*here[:index], value, *here[index + 1 :])

    @property
    def gm(self) -> fx.GraphModule:
        found: fx.GraphModule = self._part(0)
        return found

    @gm.setter
    def gm(self, value: fx.GraphModule) -> None:
        self._set(0, value)

    @property
    def length(self) -> Any:
        return self._part(1)

    @length.setter
    def length(self, value: Any) -> None:
        self._set(1, value)

    @property
    def fake_mode(self) -> Any:
        return self._part(2)

    @fake_mode.setter
    def fake_mode(self, value: Any) -> None:
        self._set(2, value)

    @property
    def placeholders(self) -> list[str]:
        return list(self._names) if self._read is not None else super().placeholders

    @property
    def graph_digest(self) -> str:
        return self._digest if self._read is not None else super().graph_digest

    @property
    def dtype(self) -> torch.dtype:
        return self._logits[0] if self._read is not None else super().dtype

    @property
    def device(self) -> torch.device:
        return self._logits[1] if self._read is not None else super().device

    @property
    def vocab_size(self) -> int:
        return self._logits[2] if self._read is not None else super().vocab_size


def check_kernels(targets: Iterable[Any]) -> None:
    """Raises CannotLoad for a kernel that is not there."""
    for target in set(targets):
        kernel = kernel_of(target)
        if kernel is not None and not kernel.available():
            raise CannotLoad(f"the kernel {kernel.name}, which is not there")


def _logits(nodes: list[dict[str, Any]]) -> tuple[torch.dtype, torch.device, int] | None:
    """Dtype, device and vocabulary of the first output, from the text."""
    (outputs,) = nodes[-1]["args"]["tuple"]
    first = (outputs["tuple"] if isinstance(outputs, dict) else outputs)[0]["node"]
    row = next(row for row in nodes if row["name"] == first)
    dtype, shape, _, *where = row["val"]["tensor"]
    if type(shape[-1]) is not int:
        return None
    return of_name("dtype", dtype), device_of(where[0]) if where else torch.device("cpu"), shape[-1]
