"""From Dynamo's graph to functional pre-dispatch ATen.

`aot_export_module` does the same in two traces of the whole graph, one to learn which inputs are written. What is
written is known at the end of one as well, and layers that repeat need not be traced again (repeated_layers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from ..errors import Refusal, Unsupported
from ..logs import logger
from .functional_trace import functional_trace
from .hidden_aliases import Interpreter
from .repeated_layers import NotSeparable, copied

log = logger(__name__)


def functional_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], fakes: Sequence[Any], mode: Any
) -> tuple[fx.GraphModule, list[str]]:
    """Functional ATen of `gm`, and the placeholders whose tensors it writes.

    `fakes` are the inputs in `mode`, with the storages of `inputs`. New contents of written inputs come first among the
    outputs, in the order of the names. Raises `Unsupported` where a written tensor is part of another input.
    """
    try:
        return copied(gm, fakes, mode), []
    except NotSeparable as reason:
        log.debug("traced as a whole: %s", reason)
    return whole_graph(gm, inputs, fakes, mode)


def whole_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], fakes: Sequence[Any], mode: Any
) -> tuple[fx.GraphModule, list[str]]:
    """`functional_graph` in one trace of every call."""

    def run(*args: Any) -> Any:
        with fx.traceback.preserve_node_meta():
            return Interpreter(gm).run(*args)

    trace = functional_trace(run, fakes, mode)
    traced = trace.graph
    traced.graph.eliminate_dead_code()
    traced.recompile()
    names = [n.name for n in traced.graph.nodes if n.op == "placeholder"]
    _refuse_shared(inputs, trace.written, names)
    return traced, [names[i] for i in trace.written]


def _refuse_shared(inputs: Sequence[Any], written: Sequence[int], names: Sequence[str]) -> None:
    """What is written to one input must not be seen through another: each is traced as a tensor of its own."""
    storages = [value.untyped_storage()._cdata if isinstance(value, Tensor) else None for value in inputs]
    for i in written:
        if storages.count(storages[i]) > 1:
            raise Unsupported(
                Refusal.STATE,
                f"the forward pass changes state in place: {names[i]}, which shares memory with another tensor",
                way_out="call it without its own cache (use_cache=False), or give each buffer its own memory",
            )
