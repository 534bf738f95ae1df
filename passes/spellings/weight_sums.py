"""One spelling of attention weights that are combined: what is done to heads of weights is done to heads of outputs.

(w1 - c * w2) v          ->  w1 v - c * (w2 v)                        (differential attention, arXiv 2410.05258)
(w[:, :, 0] - w[:, :, 1]) v  ->  (w v')[:, :, 0] - (w v')[:, :, 1]    for heads in pairs, v' being v for both
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import shape_of
from ..framework.state import GraphState
from .attention_weights import is_factor, root_softmax

aten = torch.ops.aten

_SUMS = ("aten.add", "aten.sub")
_PARTS = ("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind")


def spell_weight_sum(state: GraphState, node: fx.Node) -> bool:
    """Rewrite a product of combined attention weights with values to the combination of the products."""
    if op_name(node) != "aten.matmul" or not all(isinstance(a, fx.Node) for a in node.args):
        return False
    weights: Any = node.args[0]
    if _is_leaf(weights) or op_name(weights) == "aten.reshape" or not _combines(weights):
        return False
    result = _Products(state, node).of(weights, node.args[1])
    if result is None or shape_of(result) != shape_of(node):
        return False
    node.replace_all_uses_with(result)
    state.graph.erase_node(node)
    return True


def _is_leaf(node: Any) -> bool:
    """Whether these are one softmax's weights, perhaps some of them set to 0."""
    return root_softmax(node) is not None


def _combines(node: Any) -> bool:
    """Whether this is a sum, difference or multiple of softmaxes' weights, by factors that all keys share, or some
    heads of such."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    if _is_leaf(node):
        return True
    name = op_name(node)
    if name in _SUMS:
        return argument(node, "alpha", 1) == 1 and _combines(node.args[0]) and _combines(node.args[1])
    if name == "aten.mul":
        a, b = node.args[:2]
        return (_combines(a) and is_factor(b)) or (_combines(b) and is_factor(a))
    if name == "aten.div":
        return argument(node, "rounding_mode") is None and _combines(node.args[0]) and is_factor(node.args[1])
    if name == "aten.neg":
        return _combines(node.args[0])
    source = _picked_from(node)
    return source is not None and _combines(source)


def _picked_from(node: fx.Node) -> Any:
    """The weights of which these are some heads, or all in other groups."""
    name = op_name(node)
    if name == "aten.reshape":
        same = shape_of(node)[-2:] == shape_of(node.args[0])[-2:]
        return node.args[0] if same and all(s.is_Integer for s in shape_of(node)[:-2]) else None
    if name in ("aten.select", "aten.slice") and _over_heads(node):
        return node.args[0]
    source: Any = node.args[0]
    if node.target is operator.getitem and op_name(source) in _PARTS and _over_heads(source):
        return source.args[0]
    return None


def _over_heads(node: Any) -> bool:
    rank = len(shape_of(node.args[0]))
    return int(argument(node, "dim")) % rank < rank - 2


class _Products:
    """Emits products of weights with values before the node `at`; what is the same is emitted once."""

    def __init__(self, state: GraphState, at: fx.Node) -> None:
        self.state, self.at = state, at
        self._made: dict[Any, fx.Node] = {}

    def emit(self, op: Any, *args: Any) -> fx.Node:
        key = (op, repr(args))
        if key not in self._made:
            self._made[key] = self.state.call(op, args, like=self.at)
        return self._made[key]

    def of(self, weights: Any, values: Any) -> fx.Node | None:
        if _is_leaf(weights):
            return self.emit(aten.matmul.default, weights, values)
        name = op_name(weights)
        if name in _SUMS:
            pair = [self.of(a, values) for a in weights.args[:2]]
            return None if None in pair else self.emit(weights.target, *pair)
        if name in ("aten.mul", "aten.div"):
            a, b = weights.args[:2]
            a, b = (a, b) if _combines(a) else (b, a)
            product = self.of(a, values)
            return None if product is None else self.emit(weights.target, product, b)
        if name == "aten.neg":
            product = self.of(weights.args[0], values)
            return None if product is None else self.emit(aten.neg.default, product)
        if name == "aten.reshape":
            return self._regrouped(weights, values)
        return self._picked(weights, values)

    def _picked(self, weights: fx.Node, values: Any) -> fx.Node | None:
        part = weights if op_name(weights) in ("aten.select", "aten.slice") else weights.args[0]
        source: Any = part.args[0]
        dim = int(argument(part, "dim")) % len(shape_of(source))
        drops = op_name(part) in ("aten.select", "aten.unbind")
        spread = self._for_source(source, values, dim) if drops else self._repeated(source, weights, values, dim)
        product = None if spread is None else self.of(source, spread)
        if product is None:
            return None
        rest = part.args[1:]
        found = self.emit(part.target, product, *rest)
        return found if part is weights else self.emit(operator.getitem, found, weights.args[1])

    def _for_source(self, source: Any, values: Any, dim: int) -> fx.Node:
        """Values for all of a dimension of heads of which one was selected."""
        behind = len(shape_of(source)) - 2 - dim - 1  # dimensions of heads after it
        own = len(shape_of(values)) - 2
        return self.emit(aten.unsqueeze.default, values, own - behind) if own > behind else values

    def _repeated(self, source: Any, part: fx.Node, values: Any, dim: int) -> fx.Node | None:
        """Values for all heads of which a group, as many as the values have, was cut out."""
        at = dim - (len(shape_of(source)) - len(shape_of(values)))
        if at < 0 or shape_of(values)[at] == 1:
            return values
        whole, group = shape_of(source)[dim], shape_of(part)[dim]
        if shape_of(values)[at] != group or not (whole / group).is_Integer or not self._aligned(part, int(group)):
            return None
        return self.emit(aten.cat.default, [values] * int(whole / group), at)

    def _aligned(self, part: fx.Node, group: int) -> bool:
        """Whether the cut begins at a multiple of its size."""
        if op_name(part) == "aten.slice":
            start, step = argument(part, "start"), argument(part, "step")
            return step == 1 and (start is None or (isinstance(start, int) and start >= 0 and start % group == 0))
        source: Any = part.args[0]
        sizes = {v.shape[int(argument(source, "dim"))] for v in source.meta["val"]}
        return len(sizes) == 1

    def _regrouped(self, weights: fx.Node, values: Any) -> fx.Node | None:
        """[b, 2H, T, T] as [b, H, 2, T, T]: the values of every head, in the source's groups."""
        source: Any = weights.args[0]
        heads, inner = ([int(s) for s in shape_of(x)[:-2]] for x in (weights, source))
        width = int(shape_of(values)[-1])
        spread = values
        for _ in range(len(heads) + 2 - len(shape_of(values))):
            spread = self.emit(aten.unsqueeze.default, spread, 0)
        spread = self.emit(aten.expand.default, spread, [*heads, -1, -1])
        product = self.of(source, self.emit(aten.reshape.default, spread, [*inner, -1, width]))
        return None if product is None else self.emit(aten.reshape.default, product, [*heads, -1, width])
