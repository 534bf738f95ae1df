"""One model's graph traced by its layers and as a whole, to be held against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from treespec_compiler.capture import capture, functional, repeated_layers
from treespec_compiler.capture.call import call_spec
from treespec_compiler.capture.functional_trace import functional_trace

SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass
class Both:
    """One model's graph made in both ways."""

    layers: fx.GraphModule | None
    """By layers, None where that was refused."""
    reason: str
    whole: fx.GraphModule
    traces: int
    """How many traces the first took."""


def both(monkeypatch: pytest.MonkeyPatch, model: nn.Module, *example: Any) -> Both:
    found: list[Both] = []
    calls: list[int] = []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return functional_trace(*args)

    def run(gm: fx.GraphModule, inputs: Sequence[Any], fakes: Sequence[Any], mode: Any) -> Any:
        reason = ""
        try:
            layers: fx.GraphModule | None = repeated_layers.copied(gm, fakes, mode)
        except repeated_layers.NotSeparable as error:
            layers, reason = None, str(error)
        whole = functional.whole_graph(gm, inputs, fakes, mode)
        found.append(Both(layers, reason, copied(whole[0]), len(calls)))
        return whole

    monkeypatch.setattr(repeated_layers, "functional_trace", counted)
    monkeypatch.setattr(capture, "functional_graph", run)
    capture.capture(model, call_spec(model, *example))
    return found[0]


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """As it is now: a capture goes on to change it."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)


def rows(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """All that passes read of a node. A size is its expression: where it was computed has no meaning."""
    kept = [n for n in graph.nodes if n.op == "placeholder" or not isinstance(n.meta.get("val"), SIZES)]
    names = {n: f"v{i}" for i, n in enumerate(kept)}

    def describe(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [*map(describe, value)]
        return (value.shape, value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else type(value)

    found = []
    for n in kept:
        args = fx.node.map_arg((n.args, n.kwargs), lambda a: names.get(a) or str(a.meta["val"]))
        where = [path for path, _ in (n.meta.get("nn_module_stack") or {}).values()]
        target = "" if n.op in ("placeholder", "get_attr") else str(n.target)
        found.append((n.op, target, str(args), n.meta.get("stack_trace"), where, str(describe(n.meta.get("val")))))
    return found
