"""The way back from a snapshot of a captured graph to a graph that passes can run on."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from treespec_compiler.errors import TreespecError
from treespec_compiler.ir import ops  # noqa: F401  (defines them)
from treespec_compiler.ir.private_torch import FakeTensorMode
from treespec_compiler.ir.weights import Source

from ..framework.state import GraphState
from ..framework.weights import Weights
from .snapshot import _SHORT, NodeData, Snapshot

# Any number above 1: the dimension is symbolic.
EXAMPLE_TOKENS = 11

_DTYPES = {short: dtype for dtype, short in _SHORT.items()}


def restore(graph: Snapshot, tensors: dict[str, Tensor]) -> GraphState:
    """A state at level "captured" with new fake values; `tensors` are the weights and constants by node name."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    root, new = nn.Module(), fx.Graph()
    made: dict[str, fx.Node] = {}
    for data in graph.nodes:
        if data.op == "output":
            new.output(decode(data.args[0], made))
            continue
        if data.op == "placeholder":
            node = new.placeholder(data.name)
            node.meta["val"] = _fake_input(mode, data, graph, tensors)
        elif data.op == "get_attr":
            setattr(root, data.target, tensors[data.name])
            node = new.get_attr(data.target)
            node.meta["val"] = mode.from_tensor(tensors[data.name], static_shapes=True)
        else:
            node = _call(new, mode, data, made)
        node.name = data.name
        node.meta |= _provenance(data)
        made[data.name] = node
    gm = fx.GraphModule(root, new)
    return GraphState(
        gm=gm,
        tokens=graph.tokens,
        position_inputs=list(graph.position_inputs),
        weights=_weights(graph, tensors),
        length=made[graph.tokens].meta["val"].shape[1].node.expr,
        fake_mode=mode,
        guards=[],
        written=list(graph.written),
    )


def _weights(graph: Snapshot, tensors: dict[str, Tensor]) -> Weights:
    """The placeholders with a tensor, by the model's names for them where these were kept."""
    labels = {n.name: n.label or n.name for n in graph.nodes if n.op == "placeholder" and n.name in tensors}
    held = {label: tensors[name] for name, label in labels.items()}
    return Weights(held.__getitem__, {name: Source.of(label, held[label]) for name, label in labels.items()})


def _fake_input(mode: Any, data: NodeData, graph: Snapshot, tensors: dict[str, Tensor]) -> Tensor:
    if data.name != graph.tokens and data.name not in graph.position_inputs:
        return mode.from_tensor(tensors[data.name], static_shapes=True)
    dtype, sizes = parse_type(data.type)
    example = torch.zeros([EXAMPLE_TOKENS if s is None else s for s in sizes], dtype=dtype)
    kinds = [DimDynamic.DUCK if s is None else DimDynamic.STATIC for s in sizes]
    return mode.from_tensor(example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))


def _call(graph: fx.Graph, mode: Any, data: NodeData, made: dict[str, fx.Node]) -> fx.Node:
    # NOTE field by field: kwargs such as {"dtype": ...} look like an encoded value.
    kwargs = {k: decode(v, made) for k, v in data.kwargs.items()}
    node = graph.call_function(resolve(data.target), tuple(decode(list(data.args), made)), kwargs)
    args, fakes = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with mode:
        node.meta["val"] = node.target(*args, **fakes)
    return node


def _provenance(data: NodeData) -> dict[str, Any]:
    meta: dict[str, Any] = {}
    if data.source:
        where, _, rest = data.source.partition(", in ")
        path, _, number = where.rpartition(":")
        name, _, text = rest.partition(": ")
        meta["stack_trace"] = f'  File "{path}", line {number}, in {name}\n    {text}\n'
    if data.layer:
        meta["nn_module_stack"] = {"layer": (f"L['self'].{data.layer}", "")}
    return meta


def parse_type(text: str) -> tuple[torch.dtype, list[int | None]]:
    """dtype and sizes of `f32[1, T, 32]`; None for a size that is a symbol."""
    short, _, rest = text.rstrip("]").partition("[")
    sizes = [s.strip() for s in rest.split(",") if s.strip()]
    return _DTYPES[short], [int(s) if s.isdecimal() else None for s in sizes]


def resolve(target: str) -> Any:
    """The function that `snapshot.target_name` named: an operator of torch, or one of Python's `operator` module."""
    parts = target.split(".")
    space = getattr(torch.ops, parts[0], None)
    if len(parts) == 3 and hasattr(space, parts[1]):
        return getattr(getattr(space, parts[1]), parts[2])
    if len(parts) == 2 and parts[0] in ("_operator", "math", "torch"):
        return getattr(importlib.import_module(parts[0]), parts[1])
    raise TreespecError(f"The graph calls {target}, which is no operator of this installation of torch and treespec.")


def decode(value: Any, made: dict[str, fx.Node]) -> Any:
    """The inverse of `snapshot.encode`."""
    if isinstance(value, list):
        return [decode(v, made) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        kind, inner = next(iter(value.items()))
        if kind == "node":
            return made[inner]
        if kind in ("dtype", "layout", "memory_format"):
            return getattr(torch, inner)
        if kind == "device":
            return torch.device(inner)
        if kind == "float":
            return float(inner)
        if kind == "slice":
            return slice(*(decode(v, made) for v in inner))
        if kind == "text":
            raise TreespecError(f"The graph has an argument that a file cannot hold: {inner}.")
    return {k: decode(v, made) for k, v in value.items()}
