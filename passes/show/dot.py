"""A graph as Graphviz source: a cluster for each shown layer, a box for each folded one. Weights are left out."""

from __future__ import annotations

import json

from .layers import sections
from .snapshot import NodeData, Snapshot
from .view import View, shown


def dot(graph: Snapshot, view: View) -> str:
    visible = [part for part, _ in shown(graph, view) if part is not None]
    names = {n.name for part in visible for n in part.nodes}
    box = {n.name: part.group for part in sections(graph) for n in part.nodes if n.name not in names}
    lines = ["digraph treespec {", "  rankdir=TB; node [shape=box, fontname=monospace, fontsize=10];"]
    for i, part in enumerate(visible):
        lines.append(f"  subgraph cluster_{i} {{ label={json.dumps(part.group)};")
        lines += [f"    {_id(n.name)} {_label(n.short_target, n)};" for n in part.nodes]
        lines.append("  }")
    lines += [
        f"  {_id(group)} [style=filled, label={_id(group + ' (folded)')}];" for group in sorted(set(box.values()))
    ]
    hidden = {n.name for n in graph.nodes if n.label}
    inputs = [n for n in graph.nodes if n.op == "placeholder" and n.name not in hidden]
    lines += [f"  {_id(n.name)} {_label('tokens' if n.name == graph.tokens else n.name, n)};" for n in inputs]
    edges: dict[str, None] = {}
    for node in graph.nodes:
        for source in node.inputs:
            start, end = box.get(source, source), box.get(node.name, node.name)
            if source not in hidden and start != end:
                edges[f"  {_id(start)} -> {_id(end)};"] = None
    return "\n".join([*lines, *edges, "}"]) + "\n"


def _id(name: str) -> str:
    return json.dumps(name)


def _label(title: str, node: NodeData) -> str:
    text = f"{title}\n{node.type}"
    return f"[label={json.dumps(text)}]"
