"""fuse: linears on constant weights become packed skinny products; linears that share their input become one.

Decoding multiplies few rows by large matrices, so the weight is read once, in the order the kernel wants it, and
q/k/v or gate/up projections are one product whose result is split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from treespec_compiler.ir import ops  # noqa: F401  (defines treespec::packed_linear)
from treespec_compiler.ir.linear import pack_weight

from .closed_form import shape_of
from .manager import Pass
from .provenance import op_name
from .state import GraphState

aten = torch.ops.aten


@dataclass(frozen=True)
class PackSpec:
    """How a packed weight or bias is made from the module's tensors: pieces in output order, [N, K] or transposed."""

    pieces: tuple[tuple[str, bool], ...]  # (placeholder name, transposed)
    bias: bool = False

    def build(self, constants: dict[str, Tensor]) -> Tensor:
        parts = [constants[n].detach().t() if t else constants[n].detach() for n, t in self.pieces]
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        return joined.contiguous() if self.bias else pack_weight(joined)


@dataclass(frozen=True)
class _Product:
    """x @ weight.T + bias of one node, with constant weight and bias."""

    node: fx.Node
    x: fx.Node
    weight: str
    transposed: bool
    bias: str | None
    out_features: int


def pack_linears(state: GraphState) -> int:
    groups: dict[tuple[fx.Node, bool], list[_Product]] = {}
    order = {n: i for i, n in enumerate(state.graph.nodes)}
    for node in state.graph.nodes:
        product = _product(state, node)
        if product is not None:
            groups.setdefault((product.x, product.bias is not None), []).append(product)
    for members in groups.values():
        _pack(state, sorted(members, key=lambda m: order[m.node]))
    return sum(map(len, groups.values()))


def _constant(state: GraphState, node: Any) -> tuple[str, bool] | None:
    """(placeholder, transposed) of a float32 CPU weight or its transpose."""
    transposed = False
    if isinstance(node, fx.Node) and op_name(node) in ("aten.t", "aten.permute", "aten.transpose") and _rank(node) == 2:
        node, transposed = node.args[0], True
    if not isinstance(node, fx.Node) or node.name not in state.constants:
        return None
    tensor = state.constants[node.name]
    if tensor.dtype is not torch.float32 or tensor.device.type != "cpu":
        return None
    return node.name, transposed


def _rank(node: fx.Node) -> int:
    return node.meta["val"].dim()


def _product(state: GraphState, node: fx.Node) -> _Product | None:
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
    source = _constant(state, weight)
    if source is None or not isinstance(x, fx.Node) or x.name in state.constants or _rank(weight) != 2:
        return None
    bias_source = _constant(state, bias) if bias is not None else None
    if bias is not None and (bias_source is None or _rank(bias) != 1):
        return None
    out = int(shape_of(node)[-1])
    return _Product(node, x, source[0], source[1] != flip, bias_source[0] if bias_source else None, out)


def _pack(state: GraphState, members: list[_Product]) -> None:
    first = members[0].node
    weight = _packed_input(state, PackSpec(tuple((m.weight, m.transposed) for m in members)))
    bias = None
    if members[0].bias is not None:
        bias = _packed_input(state, PackSpec(tuple((str(m.bias), False) for m in members), bias=True))
    sizes = [m.out_features for m in members]
    joined = state.call(torch.ops.treespec.packed_linear.default, (members[0].x, weight, bias, sum(sizes)), like=first)
    start = 0
    for member, size in zip(members, sizes, strict=True):
        part = joined
        if len(members) > 1:
            part = state.call(aten.slice.Tensor, (joined, -1, start, start + size), like=first)
        member.node.replace_all_uses_with(part)
        start += size


def _packed_input(state: GraphState, spec: PackSpec) -> fx.Node:
    """One placeholder per distinct packed tensor, however often it is used."""
    for name, known in state.packs.items():
        if known == spec:
            return state.node(name)
    node = state.add_input(f"packed_{len(state.packs)}", spec.build(state.constants))
    state.packs[node.name] = spec
    return node


PASS = Pass(
    "fuse",
    pack_linears,
    before="any level from stateful on",
    after="same level; products with constant weights are treespec::packed_linear, one per shared input",
    optional=True,
)
