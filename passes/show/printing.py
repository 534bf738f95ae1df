"""Graphs as readable typed code, as DOT and as JSON; layers of equal structure are shown once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from treespec_compiler.errors import InvalidOption

from .layers import Section, layer_numbers, relative, sections
from .snapshot import NodeData, Snapshot, short_source

FORMATS = ("code", "dot", "json")

# int64's largest value is how ATen spells "to the end".
_END = 2**63 - 1


@dataclass(frozen=True)
class View:
    """What of a graph is shown: which layer stands for those like it, only one site's module, or every node."""

    layer: int | None = None
    site: str | None = None
    fold: bool = True


def render(graph: Snapshot, format: str = "code", view: View | None = None) -> str:
    """The graph as text in one of `FORMATS`."""
    if format == "json":
        return json.dumps(graph.as_json(), indent=1)
    if format == "dot":
        return dot_text(graph, view or View())
    return code(graph, view or View())


def dot_text(graph: Snapshot, view: View) -> str:
    """The graph as Graphviz source."""
    from .dot import dot

    return dot(graph, view)


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


def shown(graph: Snapshot, view: View) -> list[tuple[Section | None, str]]:
    """What the view shows: (section or None when it is folded away, comment before it)."""
    parts = sections(graph)
    if view.site is not None:
        return _site_only(parts, view.site)
    if view.layer is not None and view.layer not in layer_numbers(parts):
        known = layer_numbers(parts)
        expected = f"0 to {known[-1]}" if known else "none: this graph has no numbered layers"
        raise InvalidOption(name="--layer", got=view.layer, expected=expected)
    standing: dict[int, Section] = {}
    for part in parts:
        if part.group and (part.shape not in standing or part.index == view.layer):
            standing[part.shape] = part
    alike: dict[int, list[Section]] = {}
    for part in parts:
        if part.group:
            alike.setdefault(part.shape, []).append(part)
    result: list[tuple[Section | None, str]] = []
    folded: list[Section] = []

    def flush() -> None:
        if folded:
            first, last = folded[0], folded[-1]
            span = first.group if first is last else f"{first.group} to {last.group}"
            count = sum(len(p.nodes) for p in folded)
            result.append((None, f"{span}: {count} nodes, structure of {standing[first.shape].group}, folded"))
            folded.clear()

    for part in parts:
        if not part.group:
            flush()
            result.append((part, "outside the layers" if result else ""))
        elif view.fold and standing[part.shape] is not part:
            if folded and folded[-1].shape != part.shape:
                flush()
            folded.append(part)
        else:
            flush()
            others = len(alike[part.shape]) - 1
            same = f", {others} more of this structure" if others and view.fold else ""
            result.append((part, f"{part.group}: {len(part.nodes)} nodes{same}"))
    flush()
    return result


def _site_only(parts: list[Section], site: str) -> list[tuple[Section | None, str]]:
    wanted = site.split("#")[0]
    if site.lstrip("#").isdecimal():
        wanted = next((n.layer for p in parts for n in p.nodes if n.site == int(site.lstrip("#"))), site)
    result: list[tuple[Section | None, str]] = []
    hidden = 0
    for part in parts:
        nodes = tuple(n for n in part.nodes if n.layer == wanted or n.layer.startswith(wanted + "."))
        hidden += len(part.nodes) - len(nodes)
        if nodes:
            result.append((Section(part.group, part.index, nodes, part.shape), f"{wanted}: {len(nodes)} nodes"))
    if not result:
        known = sorted({n.layer for p in parts for n in p.nodes if n.site is not None})
        expected = ", ".join(known) if known else "a module path of the graph"
        raise InvalidOption(name="--site", got=site, expected=expected, fix="`treespec explain` names the sites.")
    return [*result, (None, f"{hidden} nodes of other modules are not shown")]


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
