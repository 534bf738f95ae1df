"""Graphs as readable typed code, as DOT and as JSON; layers of equal structure are shown once."""

from __future__ import annotations

import json
from typing import Any

from .dot import dot
from .layers import Section, relative
from .snapshot import NodeData, Snapshot, short_source
from .view import View, shown

FORMATS = ("code", "dot", "json")

# int64's largest value is how ATen spells "to the end".
_END = 2**63 - 1


def render(graph: Snapshot, format: str = "code", view: View | None = None) -> str:
    """The graph as text in one of `FORMATS`."""
    if format == "json":
        return json.dumps(graph.as_json(), indent=1)
    if format == "dot":
        return dot(graph, view or View())
    return code(graph, view or View())


def code(graph: Snapshot, view: View) -> str:
    """A function in Python's syntax: a line a node, with its type, under its layer and source line."""
    names = {graph.tokens: "tokens"} | {n.name: n.label for n in graph.nodes if n.label}
    lines = [*_signature(graph), ""]
    for section, note in shown(graph, view):
        if note:
            lines += ["", f"    # {note}"]
        if section is not None:
            lines += _body(section, names)
    output = next((n for n in graph.nodes if n.op == "output"), None)
    if output is not None:
        lines += ["", f"    return {_text(output.args[0], names, '')}"]
    return "\n".join(lines) + "\n"


def _signature(graph: Snapshot) -> list[str]:
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    weights = [n for n in inputs if n.label]
    lines = [f"def after_{graph.after.replace(' ', '_')}(  # level: {graph.level}"]
    for node in inputs:
        if not node.label:
            lines.append(f"    {'tokens' if node.name == graph.tokens else node.name}: {node.type},")
    attributes = [n for n in graph.nodes if n.op == "get_attr"]
    lines += [f"    # constant {n.name}: {n.type}" for n in attributes]
    if weights:
        lines.append(f"    # and {len(weights)} weights and buffers, by their names in the module")
    return [*lines, "):"]


def _body(section: Section, names: dict[str, str]) -> list[str]:
    lines, source = [], ""
    for node in section.nodes:
        if node.source and node.source != source:
            lines.append(f"    # {short_source(node.source)}")
            source = node.source
        lines.append(f"    {line(node, names, section.group)}")
    return lines


def line(node: NodeData, names: dict[str, str], group: str = "") -> str:
    """`mul: f32[1, T, 4] = aten.mul(x, inv_freq)`."""
    words = [_text(a, names, group) for a in node.args]
    words += [f"{k}={_text(v, names, group)}" for k, v in node.kwargs.items()]
    return f"{node.name}: {node.type} = {node.short_target}({', '.join(words)})"


def _text(value: Any, names: dict[str, str], group: str) -> str:
    if isinstance(value, dict):
        kind, inner = next(iter(value.items()), ("text", ""))
        if kind == "node":
            return relative(names.get(inner, inner), group)
        return ":".join(_text(v, names, group) for v in inner) if kind == "slice" else str(inner)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_text(v, names, group) for v in value) + "]"
    return "END" if value == _END and value is not True else repr(value)
