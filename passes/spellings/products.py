"""Matrix products with constant weights, grouped by what they multiply: what can become one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import shape_of
from ..framework.state import GraphState

aten = torch.ops.aten

Usable = Callable[[Tensor], bool]


@dataclass(frozen=True)
class JoinSpec:
    """How a weight or bias is made from the module's tensors: pieces in output order, each [N, K] or transposed."""

    pieces: tuple[tuple[str, bool], ...]  # (placeholder name, transposed)

    def build(self, constants: dict[str, Tensor]) -> Tensor:
        """[sum N, K], or [sum N] of biases; contiguous."""
        parts = [constants[n].detach().t() if t else constants[n].detach() for n, t in self.pieces]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).contiguous()


@dataclass(frozen=True)
class Product:
    """x @ weight.T + bias of one node, with constant weight and bias."""

    node: fx.Node
    x: fx.Node
    weight: str
    transposed: bool
    bias: str | None
    out_features: int


def products(state: GraphState, usable: Usable) -> list[list[Product]]:
    """All products with `usable` weights, those of one input and kind together, each group in graph order."""
    groups: dict[tuple[fx.Node, bool], list[Product]] = {}
    for node in state.graph.nodes:
        product = _product(state, node, usable)
        if product is not None:
            groups.setdefault((product.x, product.bias is not None), []).append(product)
    return list(groups.values())


def weight_pieces(members: Sequence[Product]) -> tuple[tuple[str, bool], ...]:
    return tuple((m.weight, m.transposed) for m in members)


def bias_pieces(members: Sequence[Product]) -> tuple[tuple[str, bool], ...]:
    return tuple((str(m.bias), False) for m in members)


def built_input(state: GraphState, spec: Any) -> fx.Node:
    """One placeholder per distinct built tensor, however often it is used."""
    for name, known in state.packs.items():
        if known == spec:
            return state.node(name)
    node = state.add_input(f"packed_{len(state.packs)}", spec.build(state.constants))
    state.packs[node.name] = spec
    return node


def replace_by_slices(state: GraphState, members: Sequence[Product], joined: fx.Node) -> None:
    """Every member reads its columns of `joined` [.., sum of out_features]."""
    start = 0
    for member in members:
        part, end = joined, start + member.out_features
        if len(members) > 1:
            part = state.call(aten.slice.Tensor, (joined, -1, start, end), like=members[0].node)
        member.node.replace_all_uses_with(part)
        start = end


def _constant(state: GraphState, node: Any, usable: Usable) -> tuple[str, bool] | None:
    """(placeholder, transposed) of a usable weight or its transpose."""
    transposed = False
    if isinstance(node, fx.Node) and op_name(node) in ("aten.t", "aten.permute", "aten.transpose") and _rank(node) == 2:
        node, transposed = node.args[0], True
    if not isinstance(node, fx.Node) or node.name not in state.constants or not usable(state.constants[node.name]):
        return None
    return node.name, transposed


def _rank(node: fx.Node) -> int:
    return node.meta["val"].dim()


def _product(state: GraphState, node: fx.Node, usable: Usable) -> Product | None:
    name, args = op_name(node), node.args
    if name == "aten.linear":
        x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else node.kwargs.get("bias")
        flip = False
    elif name == "aten.addmm" and not node.kwargs:
        bias, x, weight = args[:3]
        flip = True
    elif name in ("aten.matmul", "aten.mm"):
        (x, weight), bias, flip = args[:2], None, True
    else:
        return None
    source = _constant(state, weight, usable)
    if source is None or not isinstance(x, fx.Node) or x.name in state.constants or _rank(weight) != 2:
        return None
    bias_source = _constant(state, bias, usable) if bias is not None else None
    if bias is not None and (bias_source is None or _rank(bias) != 1):
        return None
    out = int(shape_of(node)[-1])
    return Product(node, x, source[0], source[1] != flip, bias_source[0] if bias_source else None, out)
