"""Where tokens stand in a value, and what says that an op moves information between them."""

from __future__ import annotations

from typing import Any, Protocol

import sympy
from torch import fx

Axis = int | None


class Mixes(Exception):
    """The op moves information between tokens; the text says how."""


class Axes(Protocol):
    """The token dimension of every node before this one."""

    length: sympy.Expr
    axes: dict[fx.Node, Axis]


def rank_of(node: Any) -> int:
    return node.meta["val"].dim()


def operands_of(node: fx.Node, axes: Axes) -> list[tuple[fx.Node, Axis]]:
    return [(a, axes.axes[a]) for a in node.all_input_nodes if a in axes.axes]
