"""Structural comparison of two snapshots: what a node computes counts, its name and its place in the file do not.

First every node gets a hash of the computation behind it; equal hashes are pairs. What is left is paired from the
inputs on: same call, same literals, same module, and as many operands as possible already paired. A pair whose operands
or type differ is a changed node.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from .snapshot import NodeData, Snapshot

PairKind = Literal["same", "changed", "removed", "added"]


@dataclass(frozen=True)
class Difference:
    """`pairs` maps names in `a` to names in `b`; `changed` are names in `a` whose pair is another call."""

    a: Snapshot
    b: Snapshot
    pairs: dict[str, str]
    changed: frozenset[str]

    @property
    def removed(self) -> list[str]:
        return [n.name for n in self.a.nodes if n.name not in self.pairs]

    @property
    def added(self) -> list[str]:
        taken = set(self.pairs.values())
        return [n.name for n in self.b.nodes if n.name not in taken]

    @property
    def equal(self) -> bool:
        return not (self.changed or self.removed or self.added)

    def rows(self) -> Iterator[tuple[PairKind, NodeData | None, NodeData | None]]:
        """Nodes of both graphs in one order: `b`'s, with removed nodes behind the last pair before them."""
        back = {b: a for a, b in self.pairs.items()}
        in_a = {n.name: n for n in self.a.nodes}
        behind: dict[str | None, list[NodeData]] = defaultdict(list)
        last: str | None = None
        for node in self.a.nodes:
            if node.name in self.pairs:
                last = self.pairs[node.name]
            else:
                behind[last].append(node)
        for gone in behind[None]:
            yield "removed", gone, None
        for node in self.b.nodes:
            partner = back.get(node.name)
            if partner is None:
                yield "added", None, node
            else:
                yield ("changed" if partner in self.changed else "same"), in_a[partner], node
            for gone in behind[node.name]:
                yield "removed", gone, None


def compare(a: Snapshot, b: Snapshot) -> Difference:
    pairs = _pair_inputs(a, b)
    names_b = {pairs[n.name]: n.name for n in a.nodes if n.name in pairs}
    hashes_a, hashes_b = _hashes(a, {n: n for n in pairs}), _hashes(b, names_b)
    waiting: dict[int, list[str]] = defaultdict(list)
    for node in b.nodes:
        if node.op not in ("placeholder", "get_attr"):
            waiting[hashes_b[node.name]].append(node.name)
    for node in a.nodes:
        if node.op not in ("placeholder", "get_attr") and waiting[hashes_a[node.name]]:
            pairs[node.name] = waiting[hashes_a[node.name]].pop(0)
    _pair_rest(a, b, pairs)
    nodes_a, nodes_b = {n.name: n for n in a.nodes}, {n.name: n for n in b.nodes}
    changed = {x for x, y in pairs.items() if _call(nodes_a[x], pairs) != _call(nodes_b[y], None)}
    return Difference(a, b, pairs, frozenset(changed))


def _pair_inputs(a: Snapshot, b: Snapshot) -> dict[str, str]:
    """Inputs by name, else by the weight's name in the module; those left over in order, by type."""
    ins_a, ins_b = ([n for n in g.nodes if n.op in ("placeholder", "get_attr")] for g in (a, b))
    pairs: dict[str, str] = {}
    for key in (_own_name, _module_name):
        taken = set(pairs.values())
        found = {key(n): n.name for n in ins_b if n.name not in taken and key(n)}
        pairs |= {n.name: found[key(n)] for n in ins_a if n.name not in pairs and key(n) in found}
    rest_a = [n for n in ins_a if n.name not in pairs]
    rest_b = [n for n in ins_b if n.name not in pairs.values()]
    matcher = difflib.SequenceMatcher(None, [n.type for n in rest_a], [n.type for n in rest_b], False)
    for block in matcher.get_matching_blocks():
        for i in range(block.size):
            pairs[rest_a[block.a + i].name] = rest_b[block.b + i].name
    return pairs


def _own_name(node: NodeData) -> tuple[str, str, str]:
    return node.name, node.type, node.label


def _module_name(node: NodeData) -> tuple[str, str] | None:
    return (node.label, node.type) if node.label else None


def _hashes(graph: Snapshot, inputs: dict[str, str]) -> dict[str, int]:
    """Hash of the computation behind each node; an unpaired input is like no other."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            found[node.name] = (
                hash(("input", inputs[node.name])) if node.name in inputs else hash((id(graph), node.name))
            )
        else:
            found[node.name] = hash((node.op, _target(node), _key((node.args, node.kwargs), found), node.type))
    return found


def _target(node: NodeData) -> str:
    return node.target if node.op == "call_function" else node.op


def _key(value: Any, names: dict[str, Any] | None) -> Any:
    if isinstance(value, dict):
        if set(value) == {"node"}:
            return "node", value["node"] if names is None else names.get(value["node"], ("gone", value["node"]))
        return tuple((k, _key(v, names)) for k, v in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(_key(v, names) for v in value)
    return type(value).__name__, value


def _call(node: NodeData, names: dict[str, str] | None) -> Any:
    if node.op in ("placeholder", "get_attr"):
        return node.op, node.type
    return _target(node), _key((node.args, node.kwargs), names), node.type


def _pair_rest(a: Snapshot, b: Snapshot, pairs: dict[str, str]) -> None:
    """Pair nodes whose inputs changed: the same call in the same module that shares most operands."""
    taken = set(pairs.values())
    free: dict[Any, list[NodeData]] = defaultdict(list)
    for node in b.nodes:
        if node.name not in taken and node.op not in ("placeholder", "get_attr"):
            free[_local(node)].append(node)
    for node in a.nodes:
        if node.name in pairs or node.op in ("placeholder", "get_attr"):
            continue
        candidates = free[_local(node)]
        if not candidates:
            continue
        mapped = [pairs.get(i) for i in node.inputs]
        scores = [
            (sum(x == y for x, y in zip(mapped, c.inputs)) + (c.source == node.source), -i)
            for i, c in enumerate(candidates)
        ]
        score, best = max(scores)
        if score or not node.inputs:
            pairs[node.name] = candidates.pop(-best).name


def _local(node: NodeData) -> Any:
    """What a node is without its operands."""
    literals = _key((node.args, node.kwargs), dict.fromkeys(node.inputs, ""))
    return _target(node), literals, node.layer
