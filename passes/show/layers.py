"""Layers of a snapshot: nodes in a row that belong to the same numbered submodule, and which layers are alike."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from treespec_compiler.ir.provenance import group_of

from .snapshot import NodeData, Snapshot

_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Section:
    """Nodes in a row; `group` is the layer's path such as `model.layers.3`, or "" between layers."""

    group: str
    index: int | None
    nodes: tuple[NodeData, ...]
    shape: int  # equal for sections of equal structure


def sections(graph: Snapshot) -> list[Section]:
    """The calls of a graph, cut where the layer changes."""
    known = {n.name: n for n in graph.nodes}
    found: list[tuple[str, int | None, list[NodeData]]] = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        group, index = group_of(node.layer)
        if not found or found[-1][0] != group:
            found.append((group, index, []))
        found[-1][2].append(node)
    return [Section(g, i, tuple(nodes), hash(_structure(g, nodes, known))) for g, i, nodes in found]


def _structure(group: str, nodes: list[NodeData], known: dict[str, NodeData]) -> Any:
    """What makes layers alike: ops, literals and types; what comes from outside only by its type and order."""
    inside = {n.name: i for i, n in enumerate(nodes)}
    outside: dict[str, int] = {}

    def name(reference: str) -> Any:
        if reference in inside:
            return inside[reference]
        node = known[reference]
        if node.op == "call_function":
            return "outside", outside.setdefault(reference, len(outside)), node.type
        return "input", relative(node.label, group) if node.label else _DIGITS.sub("#", node.name), node.type

    def key(value: Any) -> Any:
        if isinstance(value, dict):
            return name(value["node"]) if "node" in value else tuple((k, key(v)) for k, v in sorted(value.items()))
        if isinstance(value, (list, tuple)):
            return tuple(map(key, value))
        return type(value).__name__, value

    rows = tuple((n.target, key(n.args), key(n.kwargs), n.type, relative(n.layer + ".", group)) for n in nodes)
    return _DIGITS.sub("#", group), rows


def relative(path: str, group: str) -> str:
    """`self_attn.q_proj.weight` inside `model.layers.0`."""
    return path.removeprefix(group + ".") if group and path.startswith(group + ".") else path


def layer_numbers(parts: Iterable[Section]) -> list[int]:
    return sorted({s.index for s in parts if s.index is not None})
