"""From Dynamo's graph to functional pre-dispatch ATen, in one trace.

`aot_export_module` does the same in two: one to learn which inputs are written, one to trace. Half of a capture's time
is spent on the fake tensors of such a run, and what is written is known at its end. As `capture`, this file touches
private API of torch; `capture.TESTED_TORCH` is the range it was run on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .errors import Unsupported


def functional_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], fakes: Sequence[Any], mode: Any
) -> tuple[fx.GraphModule, list[str]]:
    """Functional ATen of `gm`, and the placeholders whose tensors it writes.

    `fakes` are the inputs in `mode`, with the storages of `inputs`. New contents of written inputs come first among the
    outputs, in the order of the names. Raises `Unsupported` where a written tensor is part of another input.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx, maybe_enable_thunkify

    written: list[int] = []
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
            with fx.traceback.preserve_node_meta():
                outputs = fx.Interpreter(gm).run(*wrapped)
            written.extend(i for i, a in enumerate(wrapped) if isinstance(a, FunctionalTensor) and _is_written(a))
            return tuple(plain(value) for value in (*(wrapped[i] for i in written), *outputs))

    functional = FunctionalTensorMode(pre_dispatch=True, export=True, _allow_token_discovery=True)
    with mode, enable_python_dispatcher(), functional:
        traced = make_fx(run, decomposition_table={}, record_module_stack=True, pre_dispatch=True)(*fakes)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    names = [n.name for n in traced.graph.nodes if n.op == "placeholder"]
    _refuse_shared(inputs, written, names)
    return traced, [names[i] for i in written]


def _is_written(value: Any) -> bool:
    data, metadata = torch._functionalize_has_data_mutation, torch._functionalize_has_metadata_mutation  # type: ignore
    return bool(data(value.elem) or metadata(value.elem))


def _refuse_shared(inputs: Sequence[Any], written: Sequence[int], names: Sequence[str]) -> None:
    """What is written to one input must not be seen through another: each is traced as a tensor of its own."""
    storages = [value.untyped_storage()._cdata if isinstance(value, Tensor) else None for value in inputs]
    for i in written:
        if storages.count(storages[i]) > 1:
            raise Unsupported(
                f"the forward pass changes state in place: {names[i]}, which shares memory with another tensor",
                way_out="call it without its own cache (use_cache=False), or give each buffer its own memory",
            )
