"""One spelling of softmax over the last dimension: exponentials over their sum, with or without a maximum taken off.

    exp(x) / sum(exp(x))                    softmax(x); so too exp(x) v / sum(exp(x))
    exp(x - logsumexp(x)), exp(log_softmax(x))      softmax(x)
    exp(x) / (1 + sum(exp(x)))              softmax([x, 0]) without its last column ("softmax one", Miller 2023)
    exp(x - m) / (exp(-m) + sum(exp(x - m)))        the same

What is taken off each row before stays in `x`: the reader of attention knows that a softmax does not see it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import shape_of
from ..framework.state import GraphState

aten = torch.ops.aten


def spell_softmax(state: GraphState, node: fx.Node) -> bool:
    """Rewrite a softmax that is spelled out to `aten.softmax`; False for anything else."""
    name = op_name(node)
    if name == "aten.div":
        found = _quotient(state, node, node) or _late_quotient(state, node)
    else:
        found = _exponential(state, node) if name == "aten.exp" else None
    if found is None:
        return False
    node.replace_all_uses_with(found)
    state.graph.erase_node(node)
    return True


def _softmax(state: GraphState, x: fx.Node, at: fx.Node) -> fx.Node:
    return state.call(aten.softmax.int, (x, -1), like=at)


def _exponential(state: GraphState, node: fx.Node) -> fx.Node | None:
    inner: Any = node.args[0]
    if (
        op_name(inner) == "aten.log_softmax"
        and _is_last(inner.args[1], inner.args[0])
        and argument(inner, "dtype") is None
    ):
        return _softmax(state, inner.args[0], node)
    if op_name(inner) != "aten.sub" or argument(inner, "alpha") != 1:
        return None
    x, total = inner.args[:2]
    if not isinstance(total, fx.Node) or op_name(total) != "aten.logsumexp" or total.args[0] is not x:
        return None
    return _softmax(state, x, node) if _over_last(total, x) else None


def _late_quotient(state: GraphState, node: fx.Node) -> fx.Node | None:
    """The product of a softmax with values where it is divided behind the product."""
    product: Any = node.args[0]
    if op_name(product) not in ("aten.matmul", "aten.bmm") or shape_of(product) != shape_of(node):
        return None
    below: Any = node.args[1]
    if not isinstance(below, fx.Node) or shape_of(below) != (*shape_of(node)[:-1], 1):
        return None  # one number a row
    weights = _quotient(state, node, product)
    return None if weights is None else state.call(product.target, (weights, product.args[1]), like=node)


def _quotient(state: GraphState, node: fx.Node, over: fx.Node) -> fx.Node | None:
    """The softmax that `node` is, a quotient over `over`: itself, or a product with exponentials."""
    if argument(node, "rounding_mode") is not None:
        return None
    top, below = over.args[0], node.args[1]
    if not isinstance(top, fx.Node) or not isinstance(below, fx.Node) or op_name(top) != "aten.exp":
        return None
    x: Any = top.args[0]
    if is_sum(below, top):
        return _softmax(state, x, node)
    if op_name(below) != "aten.add" or argument(below, "alpha") != 1:
        return None
    for total, extra in (below.args[:2], below.args[1::-1]):
        if isinstance(total, fx.Node) and is_sum(total, top):
            column = _column(state, x, extra, node)
            return None if column is None else _with_column(state, x, column, node)
    return None


def _column(state: GraphState, x: fx.Node, extra: Any, at: fx.Node) -> fx.Node | None:
    """The score [.., 1] whose exponential is `extra`."""
    if isinstance(extra, (int, float)):
        return _zeros(state, x, at) if extra == 1 else None
    if not isinstance(extra, fx.Node) or op_name(extra) != "aten.exp":
        return None
    score = extra.args[0]
    if not isinstance(score, fx.Node) or shape_of(score) != (*shape_of(x)[:-1], 1):
        return None
    return score


def _zeros(state: GraphState, x: fx.Node, at: fx.Node) -> fx.Node:
    """A column of zeros beside x: one number a head, seen by every query."""
    value, shape = x.meta["val"], shape_of(x)
    ones = [int(s) if s.is_Integer else 1 for s in shape[:-1]]
    zeros = state.call(aten.zeros.default, ([*ones, 1],), {"dtype": value.dtype, "device": value.device}, like=at)
    sizes: list[Any] = [*ones, 1]
    for i, size in enumerate(shape[:-1]):
        if not size.is_Integer:
            sizes[i] = state.call(aten.sym_size.int, (x, i), like=at)
    return state.call(aten.expand.default, (zeros, sizes), like=at)


def _with_column(state: GraphState, x: fx.Node, column: fx.Node, at: fx.Node) -> fx.Node | None:
    shifted = _shift(x)
    if shifted is not None and op_name(column) == "aten.neg" and column.args[0] is shifted[1]:
        # exp(s - m) / (exp(-m) + ...): both were shifted by m, which a softmax does not see.
        x = shifted[0]
        column = _zeros(state, x, at)
    joined = state.call(aten.cat.default, ([x, column], -1), like=at)
    return state.call(aten.slice.Tensor, (_softmax(state, joined, at), -1, 0, -1), like=at)


def _shift(x: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(s, m) of x = s - m for m [.., 1]."""
    if op_name(x) != "aten.sub" or argument(x, "alpha") != 1:
        return None
    s, m = x.args[:2]
    both = isinstance(s, fx.Node) and isinstance(m, fx.Node)
    return (s, m) if both and shape_of(m) == (*shape_of(s)[:-1], 1) else None


def is_sum(node: fx.Node, of: fx.Node) -> bool:
    return op_name(node) == "aten.sum" and node.args[0] is of and _over_last(node, of)


def _over_last(node: fx.Node, of: fx.Node) -> bool:
    """A reduction over the last dimension that keeps it."""
    dims, keep = argument(node, "dim"), argument(node, "keepdim")
    if not isinstance(dims, (list, tuple)) or len(dims) != 1 or not keep or argument(node, "dtype") is not None:
        return False
    return _is_last(dims[0], of)


def _is_last(dim: Any, of: Any) -> bool:
    return isinstance(dim, int) and dim in (-1, len(shape_of(of)) - 1)
