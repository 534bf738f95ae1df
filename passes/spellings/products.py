"""Matrix products with constant weights, grouped by what they multiply: what can become one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name
from treespec_compiler.ir.weights import Expression, Join, Transpose

from ..forms.closed_form import shape_of
from ..framework.state import GraphState

aten = torch.ops.aten

Usable = Callable[[Expression], bool]


@dataclass(frozen=True)
class Product:
    """x @ weight.T + bias of one node, with constant weight and bias."""

    node: fx.Node
    x: fx.Node
    weight: Expression  # [N, K]
    bias: Expression | None  # [N]
    out_features: int


def products(state: GraphState, usable: Usable) -> list[list[Product]]:
    """All products with `usable` weights, those of one input and kind together, each group in graph order."""
    groups: dict[tuple[fx.Node, bool], list[Product]] = {}
    for node in state.graph.nodes:
        product = _product(state, node, usable)
        if product is not None:
            groups.setdefault((product.x, product.bias is not None), []).append(product)
    return list(groups.values())


def joined_weight(members: Sequence[Product]) -> Join:
    """[sum N, K]: the members' weights in their order."""
    return Join(tuple(m.weight for m in members))


def joined_bias(members: Sequence[Product]) -> Join | None:
    """[sum N], or None: all members of a group have a bias, or none has."""
    biases = tuple(m.bias for m in members if m.bias is not None)
    return Join(biases) if biases else None


def replace_by_slices(state: GraphState, members: Sequence[Product], joined: fx.Node) -> None:
    """Every member reads its columns of `joined` [.., sum of out_features]."""
    start = 0
    for member in members:
        part, end = joined, start + member.out_features
        if len(members) > 1:
            part = state.call(aten.slice.Tensor, (joined, -1, start, end), like=members[0].node)
        member.node.replace_all_uses_with(part)
        start = end


def _constant(state: GraphState, node: Any, usable: Usable) -> Expression | None:
    """A usable weight or its transpose."""
    transposed = False
    if isinstance(node, fx.Node) and _rank(node) == 2 and _swaps(node):
        node, transposed = node.args[0], True
    made = state.weights.get(node.name) if isinstance(node, fx.Node) else None
    if made is None or not usable(made):
        return None
    return Transpose(made) if transposed else made


def _swaps(node: fx.Node) -> bool:
    """Whether the node exchanges the two dimensions of a matrix."""
    name, dims = op_name(node), node.args[1:]
    if name == "aten.permute":
        return [int(d) % 2 for d in dims[0]] == [1, 0]
    return name == "aten.t" or (name == "aten.transpose" and (dims[0] - dims[1]) % 2 == 1)


def _rank(node: fx.Node) -> int:
    return node.meta["val"].dim()


def _product(state: GraphState, node: fx.Node, usable: Usable) -> Product | None:
    name, args = op_name(node), node.args
    if name == "aten.linear":
        x, weight, bias = args
        flip = False
    elif name == "aten.addmm" and argument(node, "alpha") == 1 and argument(node, "beta") == 1:
        bias, x, weight = args[:3]
        flip = True
    elif name in ("aten.matmul", "aten.mm"):
        (x, weight), bias, flip = args[:2], None, True
    else:
        return None
    source = _constant(state, weight, usable)
    if source is None or not isinstance(x, fx.Node) or x.name in state.weights or _rank(weight) != 2:
        return None
    bias_source = _constant(state, bias, usable) if bias is not None else None
    if bias is not None and (bias_source is None or _rank(bias) != 1):
        return None
    if flip:
        source = source.of if isinstance(source, Transpose) else Transpose(source)
    return Product(node, x, source, bias_source, int(shape_of(node)[-1]))
