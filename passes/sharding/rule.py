"""What a placement rule is: it says which placements of an op's operands fit together, and what comes out.

Rules speak of whole sizes. The same rule is asked three times: for the plan (`wants`, from a result to its operands),
for the rewriting (`fits`), and by the verifier on the finished graph of one rank (`fits` with `op.local`), where
numbers among the arguments, such as the ends of a slice, are of a rank's part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from treespec_compiler.ir.arguments import signature
from treespec_compiler.ir.library import definition
from treespec_compiler.ir.provenance import op_name

from ..forms.form import Shape
from .placements import REPLICATED, Placement, Sharded

Given: TypeAlias = Sequence[Placement]


@dataclass(frozen=True)
class Op:
    """One call as a rule sees it: its tensor operands in order, with whole shapes."""

    node: fx.Node
    ranks: int
    local: bool
    operands: tuple[fx.Node, ...]
    names: tuple[str, ...]
    """Of the schema's arguments that the operands are, one each; a list's operands have the list's name."""
    shapes: tuple[Shape, ...]
    shape: Shape
    """Of the result; () of several results."""

    def argument(self, name: str) -> Any:
        """An argument by its name, or the schema's default."""
        return named(self.node)[name]

    def needs(self, table: Mapping[str, Placement]) -> tuple[Placement, ...]:
        """A placement for each operand by its argument's name; those not named are replicated."""
        return tuple(table.get(name, REPLICATED) for name in self.names)

    def first(self, name: str, given: Given) -> Placement:
        """What is given of the (first) operand of this name; replicated where there is none."""
        return given[self.names.index(name)] if name in self.names else REPLICATED

    def rank_of(self, name: str) -> int:
        """Dimensions of the operand of this name."""
        return len(self.shapes[self.names.index(name)])


@dataclass(frozen=True)
class Fit:
    """The placements that the operands must have, and what comes out; a tuple for several results."""

    needs: tuple[Placement, ...]
    gives: Placement | tuple[Placement, ...]


@dataclass(frozen=True)
class Want:
    """A cut that an operand should have, from `start` of its dimension on, so that a result is cut."""

    operand: int
    cut: Sharded
    start: int = 0


def no_wants(op: Op, cut: Sharded) -> list[Want] | None:
    """The result cannot be cut by cutting operands."""
    return None


def same_numbers(op: Op, outcome: Fit) -> dict[str, Any]:
    """No argument changes with the size of a part."""
    return {}


@dataclass(frozen=True)
class PlacementRule:
    """How an op treats cut operands.

    `fits`: from what is given of the operands, what they must be and what comes out; None: all must be replicated.
    `wants`: the operands' cuts that make the result come out with this one; None: there are none.
    `numbers`: arguments by name that are others for a rank's part.
    """

    fits: Callable[[Op, Given], Fit | None]
    wants: Callable[[Op, Sharded], list[Want] | None] = no_wants
    numbers: Callable[[Op, Fit], dict[str, Any]] = same_numbers


def named(node: fx.Node) -> dict[str, Any]:
    """Every argument of a call by name, in the schema's order, defaults included."""
    known = signature(node.target)
    if known is None:
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    found = {name: node.args[i] if i < len(node.args) else default for i, (name, default) in enumerate(known.places)}
    found.update({k: v for k, v in node.kwargs.items() if k in found})
    return found | {name: node.kwargs.get(name, default) for name, default in known.named}


def with_arguments(node: fx.Node, changes: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's args and kwargs with other values of some arguments."""
    known = signature(node.target)
    args, kwargs = list(node.args), dict(node.kwargs)
    for name, value in changes.items():
        place = known.at.get(name) if known is not None else int(name)
        if place is not None and place < len(args):
            args[place] = value
        else:
            kwargs[name] = value
    return tuple(args), kwargs


def operands(node: fx.Node) -> Iterator[tuple[str, fx.Node]]:
    """(name of the argument, operand) of every tensor that a call reads, in the schema's order."""
    for name, value in named(node).items():
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(each, fx.Node) and isinstance(each.meta.get("val"), (torch.Tensor, tuple, list)):
                yield name, each


def meaning(node: fx.Node) -> str:
    """The op's name; of a kernel, that of the op that it implements."""
    of = definition(node.target)
    return str(of.overloadpacket) if of is not None else op_name(node)
