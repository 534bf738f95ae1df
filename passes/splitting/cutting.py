"""The graph of one stage: what lies between two cuts of the residual stream, and what it needs besides.

What a stage computes without the stream (rotary angles, masks, tables) is computed from the step's own inputs, which
every stage has: positions, pages, ancestors. Nothing but the stream may come from the stage before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from treespec_compiler.ir import ops
from treespec_compiler.ir.inputs import BY_NAME, ROWS, STREAM, is_pool, pool_names
from treespec_compiler.ir.library import definition

from ..forms.closed_form import shape_of
from ..framework.state import GraphState

aten = torch.ops.aten


def behind(state: GraphState, cut: fx.Node | None, ends: Iterable[fx.Node]) -> set[fx.Node]:
    """All that `ends` are computed from, up to `cut`. Sizes that count tokens are asked of the tokens."""
    counts = token_counts(state)
    found: set[fx.Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node is cut or node in found:
            continue
        found.add(node)
        if node not in counts:
            stack += node.all_input_nodes
    return found


def token_counts(state: GraphState) -> set[fx.Node]:
    """Nodes that are the number of the call's tokens, as the size of some value.

    NOTE behind the pick of rows, values keep fake sizes from before it: there a size says nothing.
    """
    picked: set[fx.Node] = set()
    found: set[fx.Node] = set()
    for node in state.graph.nodes:
        if node.name == ROWS or not picked.isdisjoint(node.all_input_nodes):
            picked.add(node)
        elif node.target is aten.sym_size.int and shape_of(node.args[0])[node.args[1]] == state.length:
            found.add(node)
    return found


def weights_behind(state: GraphState, cut: fx.Node | None, end: fx.Node) -> dict[str, int]:
    """Weights between two cuts, with their bytes."""
    names = [n.name for n in behind(state, cut, [end]) if n.name in state.weights]
    return {name: _bytes(state.weights[name]) for name in names}


def sites_of(nodes: Iterable[fx.Node]) -> list[int]:
    """Attention sites among them, in order."""
    return sorted(n.meta["site"] for n in nodes if definition(n.target) is ops.tree_attention)


def take(state: GraphState, cut: fx.Node | None, end: fx.Node | None) -> None:
    """The graph becomes what lies between the two cuts, in place; None: the model's own begin or end."""
    output = end or state.logits
    needed, counts = behind(state, cut, [output]), token_counts(state)
    sites = sites_of(needed)
    graph, known, inputs = fx.Graph(), dict[fx.Node, fx.Node](), list[str]()
    for node in (n for n in state.graph.nodes if n.op == "placeholder"):
        if node in needed or node.name == state.tokens or (node.name in BY_NAME and node.name in state.inputs):
            known[node] = _placeholder(graph, node, sites[0])
            inputs += [known[node].name] if node.name in state.inputs else []
    if cut is not None:
        known[cut] = graph.placeholder(STREAM.name)
        known[cut].meta["val"] = cut.meta["val"]
        inputs.append(known[cut].name)
    for node in (n for n in state.graph.nodes if n.op not in ("placeholder", "output") and n in needed):
        if node in counts:
            new = graph.call_function(aten.sym_size.int, (known[state.node(state.tokens)], 1))
            new.meta = {**node.meta}
        else:
            new = graph.node_copy(node, known.__getitem__)
        if "site" in new.meta:
            new.meta["site"] -= sites[0]
        known[node] = new
    graph.output((known[output],))
    held = {node.name for node in known if node.op == "placeholder"}
    for name in [name for name in state.weights if name not in held]:
        state.weights.drop(name)
    state.position_inputs = [name for name in state.position_inputs if name in held]
    state.sites = [replace(state.sites[site], index=site - sites[0]) for site in sites]
    state.whole_groups = [state.whole_groups[site] for site in sites] if state.whole_groups else []
    state.gm = fx.GraphModule(state.gm, graph)
    state.inputs = inputs
    state.outputs = state.outputs if end is None else [STREAM.name]
    state.rewritten()


def _placeholder(graph: fx.Graph, node: fx.Node, first: int) -> fx.Node:
    name = node.name
    if is_pool(name):
        reader = next(iter(node.users))
        name = pool_names(reader.meta["site"] - first)[reader.args.index(node) - 3]
    new = graph.placeholder(name)
    new.meta = {**node.meta}
    return new


def _bytes(made: Any) -> int:
    size = made.dtype.itemsize
    for side in made.shape:
        size *= side
    return int(size)
