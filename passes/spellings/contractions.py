"""One spelling of contractions: tensordot, inner, bilinear and the like are einsums, and one_hot a comparison."""

from __future__ import annotations

import string
from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..framework.state import GraphState
from .einsum import spell_einsum

aten = torch.ops.aten


def equation(node: fx.Node) -> tuple[str, list[Any]] | None:
    """The einsum that a contraction is, and its operands; None for any other op."""
    name = op_name(node)
    if name == "aten.tensordot":
        return _tensordot(node)
    if name == "aten.inner":
        a, b = node.args[:2]
        left, right = _rank(a), _rank(b)
        if not left or not right:
            return None
        one, other = _letters(left - 1), _letters(right - 1, left - 1)
        return f"{one}z,{other}z->{one}{other}", [a, b]
    if name == "aten.bilinear":
        a, b, weight = node.args[:3]
        return "...x,oxy,...y->...o", [a, weight, b]
    if name == "aten.linalg_vecdot" and argument(node, "dim") == -1 and not node.args[0].meta["val"].is_complex():
        return "...x,...x->...", list(node.args[:2])
    return None


def _tensordot(node: fx.Node) -> tuple[str, list[Any]]:
    a, b, dims_a, dims_b = node.args[:4]
    left, right = _rank(a), _rank(b)
    one = list(_letters(left))
    other = list(_letters(right, left))
    for i, j in zip(dims_a, dims_b, strict=True):
        other[int(j) % right] = one[int(i) % left]
    gone = {int(i) % left for i in dims_a}
    kept = [c for i, c in enumerate(one) if i not in gone] + [c for c in other if c not in one]
    return f"{''.join(one)},{''.join(other)}->{''.join(kept)}", [a, b]


def _letters(count: int, start: int = 0) -> str:
    return string.ascii_uppercase[start : start + count]


def _rank(node: Any) -> int:
    return node.meta["val"].dim()


def spell_contraction(state: GraphState, node: fx.Node) -> bool:
    """Rewrite a contraction as the einsum that it is; False for anything else."""
    found = equation(node)
    if found is None:
        return False
    product = state.call(aten.einsum.default, found, like=node)
    bias = argument(node, "bias") if op_name(node) == "aten.bilinear" else None
    result = product if bias is None else state.call(aten.add.Tensor, (product, bias), like=node)
    node.replace_all_uses_with(result)
    state.graph.erase_node(node)
    return spell_einsum(state, product)


def spell_one_hot(state: GraphState, node: fx.Node) -> bool:
    """Rewrite `one_hot(x, n)` to `(x[..., None] == arange(n)).long()`."""
    if op_name(node) != "aten.one_hot":
        return False
    ids, classes = node.args[0], argument(node, "num_classes")
    if not isinstance(classes, int) or classes < 1 or not isinstance(ids, fx.Node):
        return False
    kind = {"dtype": torch.int64, "device": ids.meta["val"].device}
    numbers = state.call(aten.arange.default, (classes,), kind, like=node)
    column = state.call(aten.unsqueeze.default, (ids, -1), like=node)
    marks = state.call(aten.eq.Tensor, (column, numbers), like=node)
    new = state.call(aten._to_copy.default, (marks,), {"dtype": torch.int64}, like=node)
    node.replace_all_uses_with(new)
    state.graph.erase_node(node)
    return True
