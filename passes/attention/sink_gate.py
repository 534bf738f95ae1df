"""A sink applied after attention: the output times `sigmoid(logsumexp(scores) - sink)`.

With Z = sum exp(s), exp(s_j) / Z * sigmoid(log Z - sink) = exp(s_j) / (Z + exp(sink)): the factor is the same as one
more exp(sink) in the softmax's denominator. It holds when both read the same scores, and only then.
"""

from __future__ import annotations

from typing import Any

import sympy
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import ClosedForms, shape_of

_LOGSUMEXP = "aten.logsumexp"
# What may stand between the factor's parts: none of these changes the order of elements.
_SAME_ORDER = ("aten.unsqueeze", "aten.squeeze", "aten.reshape", "aten._to_copy")


def sink_gate(
    softmax: fx.Node, output: fx.Node, forms: ClosedForms, length: sympy.Expr
) -> tuple[fx.Node, fx.Node] | None:
    """(sinks with one element a head, the product that applies them) for the output of an attention, or None."""
    if len(output.users) != 1:
        return None
    product = next(iter(output.users))
    if op_name(product) != "aten.mul" or shape_of(product) != shape_of(output):
        return None
    factor: Any = product.args[1] if product.args[0] is output else product.args[0]
    if not isinstance(factor, fx.Node) or shape_of(factor) != (*shape_of(output)[:-1], 1):
        return None
    sigmoid = _through(factor)
    difference = _through(sigmoid.args[0]) if op_name(sigmoid) == "aten.sigmoid" else None
    if difference is None or op_name(difference) != "aten.sub" or argument(difference, "alpha") != 1:
        return None
    total, sinks = difference.args[:2]
    if not isinstance(sinks, fx.Node) or sinks in forms.tainted or not _is_total(total, softmax):
        return None
    return (sinks, product) if _one_a_head(sinks, total, output, length) else None


def _through(node: Any) -> Any:
    while op_name(node) in _SAME_ORDER and node.meta["val"].is_floating_point():
        node = node.args[0]
    return node


def _uncast(node: Any) -> Any:
    while op_name(node) == "aten._to_copy" and node.meta["val"].is_floating_point():
        node = node.args[0]
    return node


def _is_total(total: Any, softmax: fx.Node) -> bool:
    """Whether `total` is the logsumexp over the keys of the very scores that the softmax reads."""
    sums = _through(total) if isinstance(total, fx.Node) else None
    if sums is None or op_name(sums) != _LOGSUMEXP:
        return False
    scores: Any = sums.args[0]
    dims = [int(d) % len(shape_of(scores)) for d in sums.args[1]]
    return dims == [len(shape_of(scores)) - 1] and _uncast(scores) is _uncast(softmax.args[0])


def _one_a_head(sinks: fx.Node, total: Any, output: fx.Node, length: sympy.Expr) -> bool:
    """[.., H, T, ..1] - sinks [.., H, 1, ..1], one value for each head and the same for every query."""
    shape, heads = shape_of(total), shape_of(output)[-3]
    if length not in shape:
        return False
    at = shape.index(length) - 1
    ones = (sympy.Integer(1),) * (len(shape) - len(shape_of(sinks)))
    aligned = ones + shape_of(sinks)
    wanted = tuple(heads if i == at else sympy.Integer(1) for i in range(len(shape)))
    return at >= 0 and shape[at] == heads and aligned == wanted
