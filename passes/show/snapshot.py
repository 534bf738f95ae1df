"""A graph at one moment of the pipeline, as plain data: what is printed, compared, drawn and written to files."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from treespec_compiler.ir.arguments import short
from treespec_compiler.ir.private_torch import OpOverload
from treespec_compiler.ir.provenance import layer_path, op_name, source_line

from ..framework.state import GraphState
from ..framework.weights import Weights

SCHEMA = 1

_SHORT = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "b8",
}  # fmt: skip


@dataclass(frozen=True)
class NodeData:
    """One node. `args` and `kwargs` are JSON values; another node in them is `{"node": name}`."""

    name: str
    op: str
    target: str  # "aten.mul.Tensor" for a call
    args: Any = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    type: str = ""  # "f32[1, T, 32]"
    layer: str = ""  # "model.layers.0.self_attn"
    source: str = ""  # "file:line, in function: code"
    label: str = ""  # a weight's name in the module
    made: str = ""  # what another weight is made of: "pack(join(q.weight, k.weight))"
    site: int | None = None  # the attention site's number

    @property
    def inputs(self) -> list[str]:
        """Names of the nodes it reads, in order of appearance."""
        found: dict[str, None] = {}
        stack = [self.kwargs, self.args]
        while stack:
            value = stack.pop()
            if isinstance(value, dict):
                if "node" in value:
                    found[value["node"]] = None
                else:
                    stack.extend(reversed(list(value.values())))
            elif isinstance(value, (list, tuple)):
                stack.extend(reversed(value))
        return list(found)

    @property
    def short_target(self) -> str:
        """`aten.mul` for `aten.mul.Tensor`."""
        parts = self.target.split(".")
        return ".".join(parts[:2]) if len(parts) > 2 else self.target


@dataclass(frozen=True)
class Snapshot:
    """All nodes in order. `after` is the pass that left the graph so; "capture" before the first."""

    after: str
    level: str
    nodes: tuple[NodeData, ...]
    tokens: str
    position_inputs: tuple[str, ...] = ()
    written: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> NodeData:
        return next(n for n in self.nodes if n.name == name)

    def as_json(self) -> dict[str, Any]:
        nodes = [{k: v for k, v in vars(n).items() if v not in ("", None, {})} for n in self.nodes]
        head = {"treespec_graph": SCHEMA, "after": self.after, "level": self.level, "tokens": self.tokens}
        inputs = {"position_inputs": list(self.position_inputs), "written": list(self.written)}
        return head | inputs | {"nodes": nodes}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Snapshot:
        nodes = tuple(NodeData(**node) for node in document["nodes"])
        positions = tuple(document.get("position_inputs", ()))
        written = tuple(document.get("written", ()))
        return cls(document["after"], document["level"], nodes, document["tokens"], positions, written)


def snapshot(state: GraphState, after: str, graph: fx.Graph | None = None) -> Snapshot:
    """The state's graph as it is now, or a copy that was made of it when the rest of the state was so."""
    symbol = str(state.length)
    nodes = tuple(_node(node, symbol, state.weights) for node in (graph or state.graph).nodes)
    inputs = tuple(state.position_inputs), tuple(state.written)
    return Snapshot(after, state.level, nodes, state.tokens, *inputs)


def _node(node: fx.Node, symbol: str, weights: Weights) -> NodeData:
    source = source_line(node) or ""
    args, kwargs = short(node)
    return NodeData(
        name=node.name,
        op=node.op,
        target=target_name(node),
        args=encode(args),
        kwargs=encode(kwargs),
        type=type_text(node.meta.get("val"), symbol),
        layer=(layer_path(node) or "") if node.op == "call_function" else "",
        source=source,
        label=weights.label(node.name),
        made=str(weights[node.name]) if node.name in weights and not weights.label(node.name) else "",
        site=node.meta.get("site"),
    )


def target_name(node: fx.Node) -> str:
    """`aten.mul.Tensor`, `_operator.getitem`, or the name of an input."""
    if node.op != "call_function":
        return str(node.target)
    target: Any = node.target
    if isinstance(target, OpOverload):
        return str(target)
    module = getattr(target, "__module__", "")
    return f"{module}.{target.__name__}" if module else op_name(node)


def encode(value: Any) -> Any:
    """Arguments as JSON values; torch's own become `{"dtype": "float32"}` and the like."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, dict):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(v) for v in value]
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        kind = type(value).__name__
        return {kind: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, slice):
        return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return {"text": str(value)}


def type_text(value: Any, symbol: str) -> str:
    """`f32[1, T, 32]` for a tensor, `int T` for a size."""
    if isinstance(value, Tensor):
        sizes = ", ".join(_size(s, symbol) for s in value.shape)
        return f"{_SHORT.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{sizes}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(type_text(v, symbol) for v in value) + ")"
    if isinstance(value, torch.SymInt):
        return f"int {_size(value, symbol)}"
    return type(value).__name__ if value is not None else ""


def _size(size: Any, symbol: str) -> str:
    return re.sub(rf"\b{symbol}\b", "T", str(size)) if isinstance(size, torch.SymInt) else str(size)


def short_source(source: str) -> str:
    """The source without the place of this installation: from the package, the current folder, or the file's name."""
    path, line, rest = split_source(source)
    return f"{short_path(path)}:{line}{rest}" if line else source


def short_paths(text: str) -> str:
    """A text with `short_path` in place of every `/path:line` in it."""
    return re.sub(r"(/[^\s:,()]+)(?=:\d+)", lambda found: short_path(found[1]), text)


def split_source(source: str) -> tuple[str, str, str]:
    """`(file, line, ", in function: code")`."""
    found = re.match(r"(?P<path>.*?):(?P<line>\d+)(?P<rest>, in .*)?$", source, re.DOTALL)
    return (found["path"], found["line"], found["rest"] or "") if found else (source, "", "")


def short_path(path: str) -> str:
    for marker in ("site-packages/", "dist-packages/"):
        if marker in path:
            return path.rsplit(marker, 1)[1]
    here = Path(os.getcwd())
    if Path(path).is_relative_to(here):
        return str(Path(path).relative_to(here))
    return "/".join(Path(path).parts[-2:]).lstrip("/")
