"""Running a part of the captured graph that depends only on the number of tokens and on constants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from treespec_compiler.ir.provenance import op_name


def cone(node: fx.Node) -> set[fx.Node]:
    """The node and everything it is computed from."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in found:
            found.add(current)
            stack.extend(current.all_input_nodes)
    return found


def evaluate_for_length(
    node: fx.Node, tokens: str, constants: Mapping[str, Tensor], gm: fx.GraphModule, n: int
) -> Tensor:
    """The value of `node` for n tokens, by interpreting the nodes it depends on."""
    needed = cone(node)
    # NOTE token content is never read here (the cone has a closed form); zeros stand in for shape-only uses.
    values: dict[fx.Node, Any] = {}
    for current in gm.graph.nodes:
        if current not in needed:
            continue
        if current.op == "placeholder":
            values[current] = _placeholder(current, tokens, constants, n)
        elif current.op == "get_attr":
            values[current] = getattr(gm, str(current.target)).cpu()
        elif op_name(current) == "aten.sym_size":
            values[current] = values[current.args[0]].shape[current.args[1]]
        else:
            args, kwargs = torch.fx.node.map_arg((current.args, current.kwargs), lambda x: values[x])
            if "device" in kwargs:  # on CPU, wherever the model lives: on meta there would be no values
                kwargs = {**kwargs, "device": torch.device("cpu")}
            values[current] = current.target(*args, **kwargs)
    return values[node]


def _placeholder(node: fx.Node, tokens: str, constants: Mapping[str, Tensor], n: int) -> Any:
    if node.name == tokens:
        return torch.zeros(1, n, dtype=torch.int64)
    if node.name in constants:
        return constants[node.name].detach().cpu()
    shape = [n if not isinstance(s, int) else s for s in node.meta["val"].shape]
    return torch.arange(n).expand(shape)  # a positions input
