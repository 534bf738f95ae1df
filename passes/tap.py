"""tap: values of the residual stream become outputs beside the logits, `hidden:k` after k attention layers, and
`hidden:head`, what the head reads.

A tapped value is a proved cut (`residual.stream`). It is of every new node: where rows were picked above it, they are
picked behind it instead, as everything in between acts on each token alone. As a pass of a pipeline it taps every layer
that has such a value; a program taps what `verify(..., outputs=...)` asks for, in a copy of its graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from treespec_compiler.errors import Unsupported
from treespec_compiler.ir.inputs import ROWS
from treespec_compiler.ir.outputs import HEAD, PREFIX
from treespec_compiler.ir.private_torch import enable_python_dispatcher

from .framework.manager import Pass
from .framework.state import GraphState
from .residual.stream import after_layer, cuts, head_input

aten = torch.ops.aten


def tap(state: GraphState, names: Iterable[str]) -> int:
    """Append values [1, T, D] to the graph's outputs: `hidden:k`, the residual stream after k attention layers, and
    `hidden:head`.

    Returns how many were appended. Raises `Unsupported` where the graph has no such value; then it is as it was.
    """
    groups = cuts(state)
    found = {name: _value(state, name, groups) for name in names}
    new = {name: value for name, value in found.items() if name not in state.outputs}
    if not new:
        return 0
    order = {node: i for i, node in enumerate(state.graph.nodes)}
    lowest = max(new.values(), key=order.__getitem__)
    pick = _pick(state)
    if pick is not None and order[pick] < order[lowest]:
        _pick_behind(state, pick, lowest)
    output = state.output
    output.args = ((*output.args[0], *new.values()),)
    state.outputs = [*state.outputs, *new]
    state.clean()
    return len(new)


def _value(state: GraphState, name: str, groups: list[list[fx.Node]]) -> fx.Node:
    return head_input(state, groups) if name == HEAD else after_layer(state, int(name.removeprefix(PREFIX)), groups)


def _pick(state: GraphState) -> fx.Node | None:
    """Where the rows whose logits are wanted are picked."""
    return next((n for n in state.node(ROWS).users if n.target is aten.index_select.default), None)


def _pick_behind(state: GraphState, pick: fx.Node, value: fx.Node) -> None:
    """Pick rows of `value`, a cut, instead of rows of a value above it."""
    source: Any = pick.args[0]
    between = _between(state, pick, value)
    pick.replace_all_uses_with(source)
    state.graph.erase_node(pick)
    for node in between:  # their fake values had a row for each one picked
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with state.fake_mode, enable_python_dispatcher():
            node.meta["val"] = node.target(*args, **kwargs)
    users = [user for user in value.users if user.op != "output"]
    order = {node: i for i, node in enumerate(state.graph.nodes)}
    picked = state.call(aten.index_select.default, (value, 1, state.node(ROWS)), like=min(users, key=order.__getitem__))
    for user in users:
        user.replace_input_with(value, picked)


def _between(state: GraphState, first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """What depends on `first`, up to `last`, in graph order."""
    depends = {first}
    found = []
    for node in state.graph.nodes:
        if node is not first and depends.intersection(node.all_input_nodes):
            depends.add(node)
            found.append(node)
        if node is last:
            return found
    return found


def _tap_all(state: GraphState) -> int:
    """Every layer that has such a value, and what the head reads."""
    names = [*(f"{PREFIX}{k}" for k in range(len(state.sites) + 1)), HEAD]
    return tap(state, [name for name in names if _exists(state, name)])


def _exists(state: GraphState, name: str) -> bool:
    try:
        _value(state, name, cuts(state))
    except Unsupported:
        return False
    return True


PASS = Pass(
    "tap",
    _tap_all,
    before="rows are selected",
    after="same level; the residual stream after each attention layer, and what the head reads, are outputs too",
    optional=True,
    needs=("select rows",),
    place_after=("join linears",),
    place_before=("bind kernels",),
    standard=False,
)
