"""Functional ATen of a graph whose layers repeat: each distinct layer is traced once and copied wherever it recurs.

A trace through fake and functional tensors takes some 10 ms a call, a copy of its nodes 0.2 ms. A layer's ATen follows
from its calls, their constants and the metadata of the tensors that come from outside of it, as long as it writes to
none of those: then it matters neither which of them are views of which, nor what ran before. Writing to a tensor from
outside, and whatever else makes a layer more than a function of its arguments, raises `NotSeparable`, and the graph is
traced as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.node import map_aggregate, map_arg
from torch.utils import _pytree as pytree

from ..ir.provenance import group_of, layer_path
from .functional_trace import Trace, functional_trace, layout
from .hidden_aliases import Interpreter

# What a node has from the line and the module that it stands in; all else in `meta` follows from the call.
_PLACE = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")
_NUMBER = re.compile(r"_\d+$")
_SETTER = re.compile(r"^_?(set|enter|exit)_")
_SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)
_CONSTANTS = (int, float, complex, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class NotSeparable(Exception):
    """A layer cannot be traced apart from the others, so the graph must be traced as a whole."""


@dataclass(frozen=True)
class _Outer:
    """The i-th tensor or size that a layer has from outside."""

    index: int


@dataclass(frozen=True)
class _Inner:
    """What the i-th call of a layer gave."""

    index: int


@dataclass
class _Layer:
    """Calls in a row, with their arguments as `_Outer`, `_Inner` and constants."""

    nodes: list[fx.Node]
    arguments: list[tuple[Any, Any]]
    outer: list[fx.Node]
    """The nodes of the new graph that it reads."""
    results: list[int]
    """The calls whose values are read outside of it."""


def copied(gm: fx.GraphModule, fakes: Sequence[Any], mode: Any) -> fx.GraphModule:
    """Functional ATen of `gm`, whose inputs are `fakes` in `mode`, by a trace of each distinct layer.

    Nodes of recurring layers share one fake tensor as `meta["val"]`. Raises `NotSeparable`.
    """
    parts = list(_layers(gm))
    if len({group for group, _ in parts if group}) < 2:
        raise NotSeparable("it has less than two numbered layers")
    return _Copies(fakes, mode).of(gm, [nodes for _, nodes in parts])


def _layers(gm: fx.GraphModule) -> Iterator[tuple[str, list[fx.Node]]]:
    """The calls of a graph, cut where the numbered submodule that they belong to changes."""
    group, nodes = "", list[fx.Node]()
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op not in ("call_function", "call_method"):
            raise NotSeparable(f"{node.name} is a {node.op}")
        if _SETTER.match(str(getattr(node.target, "__name__", ""))):
            raise NotSeparable(f"{node.name} changes a setting")
        path = layer_path(node)
        if path is not None and group_of(path)[0] != group:
            if nodes:
                yield group, nodes
            group, nodes = group_of(path)[0], []
        nodes.append(node)
    yield group, nodes


class _Copies:
    """A graph in the making, and what is known of its nodes."""

    def __init__(self, fakes: Sequence[Any], mode: Any) -> None:
        self.fakes, self.mode = fakes, mode
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.constant_names: dict[int, str] = {}
        self.values: dict[fx.Node, Any] = {}  # of Dynamo's nodes: structures of nodes of `graph` and constants
        self.sizes: dict[Hashable, fx.Node] = {}  # one node for each expression
        self.traces: dict[Hashable, Trace] = {}

    def of(self, gm: fx.GraphModule, layers: Sequence[list[fx.Node]]) -> fx.GraphModule:
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        for i, (node, fake) in enumerate(zip(placeholders, self.fakes, strict=True)):
            if not isinstance(fake, (Tensor, *_SIZES)):
                raise NotSeparable(f"an input is a {type(fake).__name__}")
            new = self.graph.placeholder(f"arg{i}_1")
            new.meta["val"] = fake
            self.values[node] = self._one_size(new)
        for nodes in layers:
            self._append(self._layer(nodes))
        self.graph.output(tuple(pytree.tree_leaves(map_arg(gm.graph.output_node().args[0], self.values.__getitem__))))
        self.graph.eliminate_dead_code()
        # NOTE code for 32 layers takes 0.1 s to make, and every pass asks for it; a lazy module waits until it is run.
        return _LazyGraphModule(self.constants, self.graph)

    def _layer(self, nodes: list[fx.Node]) -> _Layer:
        inside = {node: _Inner(i) for i, node in enumerate(nodes)}
        outer: dict[fx.Node, _Outer] = {}

        def place(node: fx.Node) -> Any:
            if node in inside:
                return inside[node]
            return map_aggregate(
                self.values[node],
                lambda a: outer.setdefault(a, _Outer(len(outer))) if isinstance(a, fx.Node) else a,
            )

        arguments = [map_arg((node.args, node.kwargs), place) for node in nodes]
        results = [i for i, node in enumerate(nodes) if any(user not in inside for user in node.users)]
        return _Layer(nodes, arguments, list(outer), results)

    def _append(self, layer: _Layer) -> None:
        key = _key(layer)
        if key is None:
            self.traces.clear()  # a function of the user's may have changed what calls do
        trace = self.traces.get(key) or self._traced(layer)
        if key is not None:
            self.traces[key] = trace
        results = pytree.tree_unflatten(self._copy(trace, layer), trace.results)
        self.values |= {layer.nodes[i]: value for i, value in zip(layer.results, results, strict=True)}

    def _traced(self, layer: _Layer) -> Trace:
        graph = _graph_of(layer)

        def run(*values: Any) -> Any:
            with fx.traceback.preserve_node_meta():
                return Interpreter(nn.Module(), graph).run(*values)

        try:
            trace = functional_trace(run, self._fakes(layer.outer), self.mode)
        except Exception as error:  # a trace of the whole fails as well, in its own words
            raise NotSeparable(f"{layer.nodes[0].name} and what follows cannot be traced apart") from error
        if trace.written:
            raise NotSeparable(f"{layer.outer[trace.written[0]].name} is written by a layer that did not make it")
        if trace.restrided:
            raise NotSeparable(f"a result of {layer.nodes[0].name} and what follows has other strides in the graph")
        _refuse_effects(trace.graph)
        return trace

    def _fakes(self, nodes: Sequence[fx.Node]) -> list[Any]:
        """Their values, each an object of its own: a trace takes one fake tensor for one argument."""
        fakes: dict[int, Any] = {}
        for node in nodes:
            value = node.meta["val"]
            if id(value) in fakes:
                with self.mode:
                    value = value.detach()
            fakes[id(value)] = value
        return list(fakes.values())

    def _copy(self, trace: Trace, layer: _Layer) -> list[Any]:
        made: dict[fx.Node, Any] = {}
        placeholders, call = iter(layer.outer), 0
        for node in trace.graph.graph.nodes:
            if node.op == "placeholder":
                made[node] = next(placeholders)
            elif node.op != "output":
                number = node.stack_trace or ""  # as numbered by `_graph_of`, unless a call set traces of its own
                call = int(number) if number.isdigit() else call
                made[node] = self._copy_node(trace.graph, node, made, layer.nodes[call])
        return list(map_arg(trace.graph.graph.output_node().args[0], made.__getitem__))

    def _copy_node(self, owner: fx.GraphModule, node: fx.Node, made: dict[fx.Node, Any], origin: fx.Node) -> fx.Node:
        value = node.meta.get("val")
        if isinstance(value, _SIZES) and _size(value) in self.sizes:
            return self.sizes[_size(value)]
        args, kwargs = map_arg((node.args, node.kwargs), made.__getitem__)
        target = node.target if node.op != "get_attr" else self._constant(getattr(owner, str(node.target)))
        new = self.graph.create_node(node.op, target, args, kwargs, _NUMBER.sub("", node.name))
        new.meta = {k: v for k, v in node.meta.items() if k not in _PLACE}
        new.meta |= {k: origin.meta[k] for k in _PLACE if k in origin.meta}
        return self._one_size(new)

    def _one_size(self, node: fx.Node) -> fx.Node:
        """`node`, or the earlier node of the same size."""
        value = node.meta.get("val")
        return self.sizes.setdefault(_size(value), node) if isinstance(value, _SIZES) else node

    def _constant(self, tensor: Tensor) -> str:
        name = self.constant_names.setdefault(id(tensor), f"_tensor_constant{len(self.constant_names)}")
        self.constants[name] = tensor
        return name


def _key(layer: _Layer) -> Hashable | None:
    """Equal for layers with the same ATen; None where that cannot be told."""
    calls = []
    for node, arguments in zip(layer.nodes, layer.arguments, strict=True):
        if node.op == "call_function" and not _of_torch(node.target):
            return None  # a function of the user's may do something else each time
        calls.append((node.op, node.target, _frozen(arguments)))
    key = tuple(calls), tuple(layer.results), tuple(_metadata(node.meta["val"]) for node in layer.outer)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _of_torch(target: Any) -> bool:
    """Whether a function, custom operators included, is torch's or Python's own."""
    return str(getattr(target, "__module__", None)).partition(".")[0] in ("torch", "_operator", "builtins", "math")


def _graph_of(layer: _Layer) -> fx.Graph:
    """A layer by itself. In place of stack traces its nodes have their numbers, which a trace passes on as such."""
    graph = fx.Graph()
    outer = [graph.placeholder(f"outer_{i}") for i in range(len(layer.outer))]
    inner: list[fx.Node] = []

    def filled(value: Any) -> Any:
        if isinstance(value, _Outer):
            return outer[value.index]
        return inner[value.index] if isinstance(value, _Inner) else value

    for i, (node, arguments) in enumerate(zip(layer.nodes, layer.arguments, strict=True)):
        args, kwargs = map_aggregate(arguments, filled)
        inner.append(graph.create_node(node.op, node.target, args, kwargs))
        inner[-1].stack_trace = str(i)
    graph.output([inner[i] for i in layer.results])
    return graph


def _size(value: Any) -> Hashable:
    return type(value), value.node.expr


def _metadata(value: Any) -> Hashable:
    if isinstance(value, _SIZES):
        return _size(value)
    flags = value.requires_grad, value.is_conj(), value.is_neg(), value.is_inference()
    # A fake tensor made of a number knows it, and `.item()` gives it.
    known = getattr(value, "constant", None)
    number = None if known is None else (known.dtype, repr(known.tolist()))
    return type(value), value.dtype, value.device, value.layout, value.dim(), layout(value), flags, number


def _frozen(value: Any) -> Hashable:
    """Hashable, equal for equal arguments: 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    if isinstance(value, (tuple, list)):
        return type(value).__name__, *map(_frozen, value)
    if isinstance(value, dict):
        return "dict", *((k, _frozen(v)) for k, v in value.items())
    if isinstance(value, slice):
        return "slice", _frozen(value.start), _frozen(value.stop), _frozen(value.step)
    return type(value), repr(value) if isinstance(value, (float, complex)) else value


def _refuse_effects(graph: fx.GraphModule) -> None:
    """Raise `NotSeparable` unless ATen makes tensors and sizes of tensors and sizes, and nothing else."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    for node in graph.graph.nodes:
        plain = _of_torch(node.target) and not isinstance(node.target, torch._ops.HigherOrderOperator)
        if node.op == "call_function" and not plain:
            raise NotSeparable(f"{node.target} is no plain operator")
        if node.op == "get_attr" and not isinstance(getattr(graph, str(node.target)), Tensor):
            raise NotSeparable(f"{node.name} is a graph")
        value = node.meta.get("val")
        if isinstance(value, (Tensor, *_SIZES)) and free_unbacked_symbols(value):
            raise NotSeparable(f"the sizes of {node.name} depend on data")
    for leaf in pytree.tree_leaves(graph.graph.output_node().args[0]):
        if not isinstance(leaf, (fx.Node, *_CONSTANTS)):
            raise NotSeparable(f"a {type(leaf).__name__} leaves a layer")
