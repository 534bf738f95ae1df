"""A value computed once more, with others in the place of some that it is computed from."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from ..framework.state import GraphState


def recomputed(state: GraphState, value: fx.Node, known: Mapping[fx.Node, fx.Node], at: fx.Node) -> fx.Node:
    """`value`, inserted before `at`, where nodes of `known` are their replacements: of the same shapes and values."""
    made = dict(known)
    behind = set(known)
    for node in state.graph.nodes:
        if node is at:
            break
        if node in made or not any(a in behind for a in node.all_input_nodes):
            continue
        behind.add(node)
    wanted = _needed(value, behind)
    for node in [n for n in state.graph.nodes if n in wanted and n not in known]:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: made.get(n, n))
        made[node] = state.call(node.target, args, kwargs, like=at)
    return made.get(value, value)


def _needed(value: fx.Node, behind: set[fx.Node]) -> set[fx.Node]:
    """What `value` is computed from of the nodes in `behind`."""
    found: set[fx.Node] = set()
    stack = [value]
    while stack:
        node = stack.pop()
        if node in behind and node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found
