"""One spelling of talking heads (arXiv 2003.02436): heads of scores or of weights are mixed by a matrix W.

    sum_g W[h, g] q_g k_g^T            ->  [W[h, 0] q_0, W[h, 1] q_1, ...] [k_0, k_1, ...]^T
    (sum_g W[h, g] softmax_g) v_h      ->  sum_g W[h, g] (softmax_g [v_0, v_1, ...])_h

so that one head of keys, or of values, is as wide as all heads together: the cache holds as much as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import shape_of
from ..framework.state import GraphState
from .attention_weights import root_softmax
from .sizes import refresh, same_sizes

aten = torch.ops.aten

_LAST, _BACK = [0, 2, 3, 1], [0, 3, 1, 2]


@dataclass(frozen=True)
class _Mix:
    """`result` [1, out, T, T], or with the heads last, of `source` [1, in, T, T]."""

    source: Any
    matrix: fx.Node  # [out, in], or anything that a reshape makes that of
    transposed: bool
    bias: Any
    heads_last: bool


def spell_mixed_scores(state: GraphState, node: fx.Node) -> bool:
    """Rewrite a mix of heads of scores to one product; False for anything else."""
    mix = _mixed(state, node)
    if mix is None:
        return False
    factors, product = [], mix.source
    while isinstance(product, fx.Node) and op_name(product) in ("aten.mul", "aten.div"):
        if not isinstance(product.args[1], (int, float)) or argument(product, "rounding_mode") is not None:
            return False
        factors.append((product.target, product.args[1]))
        product = product.args[0]
    if not isinstance(product, fx.Node) or op_name(product) != "aten.matmul":
        return False
    q, k = product.args[:2]
    if len(shape_of(q)) != 4 or shape_of(q)[:2] != shape_of(k)[:2] or not shape_of(q)[-1].is_Integer:
        return False
    writer = _Writer(state, node)
    new = writer.mixed_product(q, k, writer.matrix(mix))
    for op, number in reversed(factors):
        new = writer.emit(op, new, number)
    if mix.bias is not None:
        new = writer.emit(aten.add.Tensor, new, writer.emit(aten.reshape.default, mix.bias, [1, -1, 1, 1]))
    writer.replace(writer.emit(aten.permute.default, new, _LAST) if mix.heads_last else new)
    return True


def spell_mixed_weights(state: GraphState, node: fx.Node) -> bool:
    """Rewrite the product of mixed weights with values to a mix of products; False for anything else."""
    if op_name(node) != "aten.matmul" or not isinstance(node.args[0], fx.Node):
        return False
    weights, values = node.args[:2]
    mixing: Any = weights
    if op_name(weights) == "aten.permute" and list(weights.args[1]) == _BACK:
        mixing = weights.args[0]
    mix = _mixed(state, mixing) if isinstance(mixing, fx.Node) else None
    if mix is None or mix.bias is not None or mix.heads_last != (mixing is not weights):
        return False
    if root_softmax(mix.source) is None or len(shape_of(values)) != 4 or shape_of(values)[0] != 1:
        return False
    writer = _Writer(state, node)
    writer.replace(writer.mixed_outputs(mix.source, values, writer.matrix(mix)))
    return True


def _mixed(state: GraphState, node: fx.Node) -> _Mix | None:
    name = op_name(node)
    if name == "aten.conv2d":
        return _convolution(state, node)
    if name not in ("aten.linear", "aten.matmul"):
        return None
    source, matrix = node.args[:2]
    if not isinstance(source, fx.Node) or not isinstance(matrix, fx.Node) or len(shape_of(matrix)) != 2:
        return None
    if op_name(source) != "aten.permute" or list(source.args[1]) != _LAST:
        return None
    bias = argument(node, "bias") if name == "aten.linear" else None
    mix = _Mix(source.args[0], matrix, name == "aten.matmul", bias, heads_last=True)
    return mix if _over_tokens(state, mix.source) else None


def _convolution(state: GraphState, node: fx.Node) -> _Mix | None:
    source, matrix = node.args[:2]
    plain = [argument(node, n) for n in ("stride", "padding", "groups")]
    if [list(p) if isinstance(p, (list, tuple)) else p for p in plain] != [[1, 1], [0, 0], 1]:
        return None
    if list(shape_of(matrix)[2:]) != [1, 1] or not _over_tokens(state, source):
        return None
    return _Mix(source, matrix, False, argument(node, "bias"), heads_last=False)


def _over_tokens(state: GraphState, node: Any) -> bool:
    shape = shape_of(node)
    return len(shape) == 4 and shape[0] == 1 and shape[2] == shape[3] == state.length and shape[1].is_Integer


class _Writer:
    """Emits nodes before the one that is replaced."""

    def __init__(self, state: GraphState, at: fx.Node) -> None:
        self.state, self.at = state, at

    def emit(self, op: Any, *args: Any) -> fx.Node:
        return self.state.call(op, args, like=self.at)

    def replace(self, new: fx.Node) -> None:
        if not same_sizes(new, self.at):
            raise AssertionError(f"got shape {shape_of(new)}, expected {shape_of(self.at)}")
        roundabout = shape_of(new) != shape_of(self.at)
        self.at.replace_all_uses_with(new)
        self.state.graph.erase_node(self.at)
        if roundabout:
            refresh(self.state, new)

    def matrix(self, mix: _Mix) -> fx.Node:
        """[out, in]."""
        if mix.transposed:
            return self.emit(aten.permute.default, mix.matrix, [1, 0])
        into = int(shape_of(mix.source)[1])
        return mix.matrix if mix.heads_last else self.emit(aten.reshape.default, mix.matrix, [-1, into])

    def mixed_product(self, q: Any, k: Any, matrix: fx.Node) -> fx.Node:
        """[1, out, T, T] of q [1, in, T, D] and k^T [1, in, D, T]."""
        out, into = (int(s) for s in shape_of(matrix))
        wide = into * int(shape_of(q)[-1])
        q = self.emit(aten.unsqueeze.default, self.emit(aten.transpose.int, q, 1, 2), 1)  # [1, 1, T, in, D]
        q = self.emit(aten.mul.Tensor, q, self.emit(aten.reshape.default, matrix, [1, out, 1, into, 1]))
        q = self.emit(aten.reshape.default, q, [1, out, -1, wide])
        k = self.emit(aten.transpose.int, self.emit(aten.transpose.int, k, -2, -1), 1, 2)  # [1, T, in, D]
        k = self.emit(aten.reshape.default, k, [1, 1, -1, wide])
        return self.emit(aten.matmul.default, q, self.emit(aten.transpose.int, k, -2, -1))

    def mixed_outputs(self, weights: Any, values: Any, matrix: fx.Node) -> fx.Node:
        """[1, out, T, D] of weights [1, in, T, T] and values [1, out or 1, T, D]."""
        out, into = (int(s) for s in shape_of(matrix))
        heads, width = int(shape_of(values)[1]), int(shape_of(values)[-1])
        v = self.emit(aten.reshape.default, self.emit(aten.transpose.int, values, 1, 2), [1, 1, -1, heads * width])
        product = self.emit(aten.matmul.default, weights, v)  # [1, in, T, heads * D]
        product = self.emit(aten.reshape.default, product, [1, into, -1, heads, width])
        share = self.emit(aten.reshape.default, self.emit(aten.permute.default, matrix, [1, 0]), [1, into, 1, out, 1])
        total = self.emit(aten.sum.dim_IntList, self.emit(aten.mul.Tensor, product, share), [1])  # [1, T, out, D]
        return self.emit(aten.transpose.int, total, 1, 2)
