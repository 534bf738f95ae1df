"""Where the token dimension goes in ops that move numbers around: reshapes, transpositions, slices, joins.

Rules as in `token_rules`.
"""

from __future__ import annotations

from typing import Any

import sympy
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import Shape, shape_of
from .axes import Axes, Axis, Mixes, operands_of, rank_of


def reinterpret_rule(node: fx.Node, axes: Axes) -> Axis:
    """The bits of each whole number as another type of the same size (`view(dtype)`)."""
    size, before = node.meta["val"].dtype.itemsize, node.args[0].meta["val"].dtype.itemsize
    if size != before:
        raise Mixes(f"it reads the bits of {'several elements as one' if size > before else 'one element as several'}")
    return axes.axes[node.args[0]]


def reshape_rule(node: fx.Node, axes: Axes) -> Axis:
    operand: Any = node.args[0]
    at = axes.axes[operand]
    assert at is not None
    return follow_reshape(shape_of(operand), at, shape_of(node), axes.length)


def follow_reshape(before: Shape, at: int, after: Shape, length: sympy.Expr) -> int:
    """Where dimension `at` of size T stands after a reshape; raises Mixes when it is merged or split.

    With T in dimension `at`, the element order is [outer, T, inner]; the result must split in the same three parts.
    """
    outer = sympy.prod(before[:at])
    for i, size in enumerate(after):
        if size == length and sympy.simplify(sympy.prod(after[:i]) - outer) == 0:
            return i
    raise Mixes(f"a reshape from {list(before)} to {list(after)} merges the tokens with another dimension")


def transpose_rule(node: fx.Node, axes: Axes) -> Axis:
    operand: Any = node.args[0]
    at, rank = axes.axes[operand], rank_of(operand)
    if op_name(node) == "aten.permute":
        return [int(d) % rank for d in node.args[1]].index(at)  # type: ignore[arg-type]
    pair = [int(d) % rank for d in node.args[1:3]] if op_name(node) == "aten.transpose" else [0, rank - 1]
    return pair[1 - pair.index(at)] if at in pair else at


def unsqueeze_rule(node: fx.Node, axes: Axes) -> Axis:
    at = axes.axes[node.args[0]]
    assert at is not None
    return at + (int(node.args[1]) % rank_of(node) <= at)


def squeeze_rule(node: fx.Node, axes: Axes) -> Axis:
    return reshape_rule(node, axes)


def expand_rule(node: fx.Node, axes: Axes) -> Axis:
    at = axes.axes[node.args[0]]
    assert at is not None
    return at + rank_of(node) - rank_of(node.args[0])


def slice_rule(node: fx.Node, axes: Axes) -> Axis:
    at = axes.axes[node.args[0]]
    if at == int(argument(node, "dim")) % rank_of(node.args[0]):
        raise Mixes("it cuts the token dimension")
    if any(isinstance(a, fx.Node) for a in node.args[2:]):
        raise Mixes("where it cuts depends on the number of tokens")
    return at


def select_rule(node: fx.Node, axes: Axes) -> Axis:
    at, dim = axes.axes[node.args[0]], int(node.args[1]) % rank_of(node.args[0])
    if at == dim or at is None:
        raise Mixes("it picks one token")
    return at - (dim < at)


def cat_rule(node: fx.Node, axes: Axes) -> Axis:
    found = {a for _, a in operands_of(node, axes)}
    at = next(iter(found))
    if len(found) != 1 or at is None:
        raise Mixes("its parts do not all carry the tokens in the same dimension")
    if at == int(argument(node, "dim")) % rank_of(node):
        raise Mixes("it joins along the token dimension")
    return at


def stack_rule(node: fx.Node, axes: Axes) -> Axis:
    found = {a for _, a in operands_of(node, axes)}
    at = next(iter(found))
    if len(found) != 1 or at is None:
        raise Mixes("its parts do not all carry the tokens in the same dimension")
    return at + (int(argument(node, "dim")) % rank_of(node) <= at)


def getitem_rule(node: fx.Node, axes: Axes) -> Axis:
    return axes.axes[node.args[0]]


def unbind_rule(node: fx.Node, axes: Axes) -> Axis:
    at, dim = axes.axes[node.args[0]], int(argument(node, "dim")) % rank_of(node.args[0])
    if at == dim or at is None:
        raise Mixes("it takes the tokens apart")
    return at - (dim < at)


def split_rule(node: fx.Node, axes: Axes) -> Axis:
    at = axes.axes[node.args[0]]
    if at == int(argument(node, "dim")) % rank_of(node.args[0]):
        raise Mixes("it cuts the token dimension")
    return at


def pad_rule(node: fx.Node, axes: Axes) -> Axis:
    at, widths = axes.axes[node.args[0]], list(node.args[1])
    if at is None or at >= rank_of(node) - len(widths) // 2:
        raise Mixes("it pads or shifts the token dimension")
    return at
