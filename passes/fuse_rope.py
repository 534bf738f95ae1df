"""fuse rope: attention of rotated q and k becomes one op that rotates them, where the rotation is proved.

The kernel behind it rotates k on its way into the pool, so k is read and written once. What is not proved to be a
rotation of one of the known styles, the same for q and k, stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from treespec_compiler.ir import ops
from treespec_compiler.ir.library import given
from treespec_compiler.ir.registry import best_kernel
from treespec_compiler.logs import logger
from treespec_compiler.options import Options

from .forms.form import shape_of
from .framework.manager import Pass
from .framework.state import GraphState
from .rope.rotation import Rotation, rotation

log = logger(__name__)

aten = torch.ops.aten

TURN = ("cos", "sin", "style", "rotary")
"""The arguments of `treespec::tree_attention` that make it rotate q and k."""


def fuse_rope(state: GraphState) -> int:
    matches = 0
    angles: dict[fx.Node, fx.Node] = {}
    for node in list(state.graph.nodes):
        if node.target is not ops.tree_attention or not given(node.target, node.kwargs).isdisjoint(TURN):
            continue
        q, k = (rotation(state, operand) for operand in node.args[:2])
        reason = _obstacle(node, q, k)
        if reason:
            log.info("%s: rotation and attention stay apart: %s", node.name, reason)
            continue
        assert q is not None and k is not None
        _fuse(state, node, q, k, angles)
        matches += 1
    return matches


def _obstacle(node: fx.Node, q: Rotation | None, k: Rotation | None) -> str:
    """Why q and k of an attention are not rotated by its kernel; empty: they can be."""
    if not given(node.target, node.kwargs).isdisjoint(("pattern", "activation")):
        return "its mask, or its activation, has no kernel that rotates"
    for name, found, operand in (("q", q, node.args[0]), ("k", k, node.args[1])):
        if found is None:
            return f"{name} is no rotation of a known style"
        if set(operand.users) != {node}:
            return f"{name} has other readers"
    assert q is not None and k is not None
    return "" if q.same_turn(k) else "q and k are rotated in different ways"


def _fuse(state: GraphState, node: fx.Node, q: Rotation, k: Rotation, angles: dict[fx.Node, fx.Node]) -> None:
    x = [
        state.call(aten.transpose.int, (turned.x, 1, 2), like=node) if turned.swapped else turned.x for turned in (q, k)
    ]
    cos, sin = (_columns(state, factor, q.width, node, angles) for factor in (q.cos, q.sin))
    args: tuple[Any, ...] = (*x, *node.args[2:])
    turn = dict(zip(TURN, (cos, sin, q.style, q.rotary), strict=True))
    new = state.call(ops.tree_attention, args, {**node.kwargs, **turn}, like=node)
    new.meta["site"] = node.meta["site"]
    node.replace_all_uses_with(new)
    state.graph.erase_node(node)


def _columns(state: GraphState, factor: fx.Node, width: int, node: fx.Node, made: dict[fx.Node, fx.Node]) -> fx.Node:
    """A factor as [T, width]; one node for all sites."""
    if factor not in made:
        flat = len(shape_of(factor)) == 2
        made[factor] = factor if flat else state.call(aten.reshape.default, (factor, [-1, width]), like=node)
    return made[factor]


def _has_kernel(state: GraphState, options: Options) -> bool:
    kernel = best_kernel(ops.tree_attention, state.device, state.dtype, given=TURN)
    return options.kernels == "auto" and kernel is not None


PASS = Pass(
    "fuse rope",
    fuse_rope,
    before="rows are selected",
    after="same level; attention of q and k that are proved to be rotated rotates them itself",
    optional=True,
    needs=("select rows",),
    place_before=("bind kernels",),
    standard=False,
    wanted=_has_kernel,
)
