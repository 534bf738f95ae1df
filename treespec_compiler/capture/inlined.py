"""Calls of a subgraph that mean the subgraph alone: what is computed again in training (`torch.utils.checkpoint`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_PLAIN = ("tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint", "inductor_compiled_code")


def inline_bodies(gm: fx.GraphModule) -> int:
    """Put the body of every such call in its place; returns how many there were."""
    found = 0
    for node in list(gm.graph.nodes):
        if not _is_plain_call(node):
            continue
        body_node, *operands = node.args
        body: Any = getattr(gm, str(body_node.target))
        inline_bodies(body)
        found += 1
        inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
        known = dict(zip(inputs, operands, strict=True))
        for inner in body.graph.nodes:  # what the body holds gets a name of the whole graph's own
            if inner.op == "get_attr":
                name = f"{body_node.target}_{found}_{inner.target}".replace(".", "_")
                setattr(gm, name, _held(body, str(inner.target)))
                with gm.graph.inserting_before(node):
                    known[inner] = gm.graph.get_attr(name)
                known[inner].meta = dict(inner.meta)
        with gm.graph.inserting_before(node):
            result = gm.graph.graph_copy(body.graph, known)
        for user in list(node.users):
            if isinstance(result, (tuple, list)) and getattr(user.target, "__name__", "") == "getitem":
                user.replace_all_uses_with(result[user.args[1]])
                gm.graph.erase_node(user)
        if node.users:
            node.replace_all_uses_with(result)
        gm.graph.erase_node(node)
    if found:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return found


def _is_plain_call(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    body = node.args[0] if node.args else None
    return node.target.name() in _PLAIN and isinstance(body, fx.Node) and body.op == "get_attr"


def _held(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module
