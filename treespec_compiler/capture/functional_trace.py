"""One trace of a function into functional pre-dispatch ATen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree


@dataclass
class Trace:
    """The ATen of a call."""

    graph: fx.GraphModule
    """From the arguments to the new contents of those that are written, followed by the flat results."""
    written: list[int]
    """Which arguments those are."""
    results: pytree.TreeSpec
    """The structure of the results."""
    restrided: bool
    """Whether a result has other strides in the graph than `call` gave it: a functional operator may lay out anew."""


def functional_trace(call: Callable[..., Any], fakes: Sequence[Any], mode: Any) -> Trace:
    """The ATen that `call(*fakes)` runs; `fakes` are fake tensors of `mode` and sizes, each another object."""
    from torch._dispatch.python import enable_python_dispatcher
    from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx, maybe_enable_thunkify

    found: list[tuple[list[int], pytree.TreeSpec, bool]] = []
    above = torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)

    def plain(value: Any) -> Any:
        if not isinstance(value, FunctionalTensor):
            return value
        torch._sync(value)  # type: ignore[attr-defined]
        return torch._from_functional_tensor(value.elem)

    def run(*args: Any) -> tuple[Any, ...]:
        # NOTE sizes become nodes only where a graph needs them: most of them never do.
        with maybe_enable_thunkify(), torch._C._ExcludeDispatchKeyGuard(above):
            wrapped = [FunctionalTensor.to_functional(a) if isinstance(a, Tensor) else a for a in args]
            results, structure = pytree.tree_flatten(call(*wrapped))
            written = [i for i, a in enumerate(wrapped) if isinstance(a, FunctionalTensor) and _is_written(a)]
            flat = [plain(value) for value in (*(wrapped[i] for i in written), *results)]
            pairs = zip(results, flat[len(written) :], strict=True)
            restrided = any(layout(a) != layout(b) for a, b in pairs if isinstance(a, Tensor))
            found.append((written, structure, restrided))
            return tuple(flat)

    functional = FunctionalTensorMode(pre_dispatch=True, export=True, _allow_token_discovery=True)
    with mode, enable_python_dispatcher(), functional:
        graph = make_fx(run, decomposition_table={}, record_module_stack=True, pre_dispatch=True)(*fakes)
    return Trace(graph, *found[-1])


def _is_written(value: Any) -> bool:
    changed = (
        torch._functionalize_has_data_mutation,  # type: ignore[attr-defined]
        torch._functionalize_has_metadata_mutation,
        torch._functionalize_was_storage_changed,
    )
    return any(test(value.elem) for test in changed)


def layout(value: Tensor) -> tuple[Any, ...]:
    """Sizes, strides and offset as expressions: comparing symbolic integers would add guards."""
    numbers = (*value.shape, *value.stride(), value.storage_offset())
    return tuple(n.node.expr if isinstance(n, torch.SymInt) else n for n in numbers)
