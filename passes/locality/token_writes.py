"""Rules for ops that read or write a tensor in part: along other dimensions than the tokens, they keep tokens apart."""

from __future__ import annotations

from typing import Any

from torch import fx

from treespec_compiler.ir.arguments import argument

from ..forms.closed_form import shape_of
from .axes import Axes, Axis, Mixes, rank_of
from .token_rules import RULES, AxisRule


def _places(nodes: list[Any], axes: Axes) -> set[Axis]:
    return {axes.axes[n] for n in nodes if isinstance(n, fx.Node) and n in axes.axes and rank_of(n) > 0}


def _along(dim_at: int, operands: tuple[int, ...]) -> AxisRule:
    """Operands of one rank that carry the tokens in the same dimension, which `dim` is not."""

    def rule(node: fx.Node, axes: Axes) -> Axis:
        found = _places([node.args[i] for i in operands], axes)
        at, dim = next(iter(found)), int(node.args[dim_at]) % rank_of(node.args[0])
        if len(found) != 1 or at is None:
            raise Mixes("its operands do not all carry the tokens in the same dimension")
        if at == dim:
            raise Mixes(f"it works along dimension {at}, the tokens")
        return at

    return rule


def _slice_scatter(node: fx.Node, axes: Axes) -> Axis:
    found = _places(list(node.args[:2]), axes)
    at = next(iter(found))
    if len(found) != 1 or at is None or at == int(argument(node, "dim")) % rank_of(node):
        raise Mixes("it writes along the token dimension")
    return at


def _select_scatter(node: fx.Node, axes: Axes) -> Axis:
    base, part = axes.axes[node.args[0]], axes.axes[node.args[1]]
    dim = int(node.args[2]) % rank_of(node)
    if base is None or base == dim or part != base - (dim < base):
        raise Mixes("it writes along the token dimension")
    return base


def _blank(node: fx.Node, axes: Axes) -> Axis:
    """A new tensor: nothing of its argument but the size goes in."""
    sized = [i for i, size in enumerate(shape_of(node)) if axes.length.free_symbols & size.free_symbols]
    if len(sized) != 1:
        raise Mixes(f"its shape {list(shape_of(node))} does not have the tokens in one dimension")
    return sized[0]


def _extreme(node: fx.Node, axes: Axes) -> Axis:
    """max and min: along a dimension, or of two tensors."""
    two = isinstance(argument(node, "other"), fx.Node)
    return RULES["aten.maximum" if two else "aten.amax"](node, axes)


WRITES: dict[str, AxisRule] = {
    "aten.gather": _along(1, (0, 2)),
    "aten.scatter": _along(1, (0, 2, 3)),
    "aten.scatter_add": _along(1, (0, 2, 3)),
    "aten.scatter_reduce": _along(1, (0, 2, 3)),
    "aten.slice_scatter": _slice_scatter,
    "aten.select_scatter": _select_scatter,
    "aten.copy": RULES["aten.add"],
    "aten.new_empty": _blank,
    "aten.empty_like": _blank,
    "aten.new_zeros": _blank,
    "aten.new_ones": _blank,
    "aten.new_full": _blank,
    "aten.max": _extreme,
    "aten.min": _extreme,
    "aten.argmax": RULES["aten.amax"],
    "aten.argmin": RULES["aten.amax"],
    "aten.any": RULES["aten.amax"],
    "aten.all": RULES["aten.amax"],
    "aten.prod": RULES["aten.amax"],
}
