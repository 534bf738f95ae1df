"""What a graph computes of its last token, computed of every token.

Each value of the part behind the pick is made again with a dimension of tokens: in the place of a dimension of size 1
(`x[:, -1:]` [1, 1, D] -> [1, T, D]), or put in (`x[:, -1]` [1, D] -> [1, T, D]). Ops keep their meaning for each token,
which `token locality` proves of the result; what has no rule here stays as it is, and is refused there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from treespec_compiler.ir.arguments import signature
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import Shape, shape_of
from ..framework.state import GraphState
from ..locality.token_rules import RULES

aten = torch.ops.aten


class NoRule(Exception):
    """A value that is not made for every token."""


@dataclass(frozen=True)
class Grown:
    """`node` is `old` with the tokens in dimension `at`: put in there, or (`swapped`) in the place of a size of 1."""

    old: Shape
    node: fx.Node
    at: int
    swapped: bool

    @property
    def right(self) -> int:
        """How many dimensions stand behind the tokens'."""
        return len(self.old) - self.at - self.swapped

    def dim(self, dim: int) -> int:
        """Where dimension `dim` of the old value is now."""
        dim %= max(len(self.old), 1)
        if self.swapped and dim == self.at:
            raise NoRule
        return dim if self.swapped else dim + (dim >= self.at)


class ForAll:
    """Makes values for every token, in the order of the graph."""

    def __init__(self, state: GraphState) -> None:
        self.state = state
        first = next(n for n in state.graph.nodes if n.op == "call_function")
        self.tokens = state.call(aten.sym_size.int, (state.node(state.tokens), 1), like=first)
        self.grown: dict[fx.Node, Grown] = {}

    def pick(self, node: fx.Node, along: int) -> None:
        """`node` picks the last token of its first argument along this dimension."""
        source: Any = node.args[0]
        old, whole = shape_of(node), shape_of(source)
        swapped = len(old) == len(whole)
        self.grown[node] = self._checked(Grown(old, source, along, swapped))

    def make(self, node: fx.Node) -> None:
        """Raises `NoRule`."""
        name = op_name(node)
        rule = _RULES.get(name)
        if rule is None and RULES.get(name) is RULES["aten.add"]:
            rule = _pointwise
        if rule is None:
            raise NoRule
        try:
            self.grown[node] = self._checked(rule(self, node))
        except (RuntimeError, ValueError, IndexError) as error:  # the op does not take the larger value
            raise NoRule from error

    def of(self, value: Any) -> Grown:
        if not isinstance(value, fx.Node) or value not in self.grown:
            raise NoRule
        return self.grown[value]

    def call(self, node: fx.Node, args: Any) -> fx.Node:
        """The op with other arguments; kwargs may hold none of the values."""
        if any(isinstance(v, fx.Node) and v in self.grown for v in node.kwargs.values()):
            raise NoRule
        return self.state.call(node.target, tuple(args), dict(node.kwargs), like=node)

    def sized(self, shape: Shape, at: int, swapped: bool) -> list[Any]:
        """`shape` with the tokens, as an argument."""
        sizes: list[Any] = [int(s) for s in shape]
        if swapped:
            sizes[at] = self.tokens
        else:
            sizes.insert(at, self.tokens)
        return sizes

    def _checked(self, grown: Grown) -> Grown:
        wanted = list(grown.old)
        if grown.swapped:
            if wanted[grown.at] != 1:
                raise NoRule
            wanted[grown.at] = self.state.length
        else:
            wanted.insert(grown.at, self.state.length)
        if list(shape_of(grown.node)) != wanted:
            raise NoRule
        return grown


def _pointwise(all_: ForAll, node: fx.Node) -> Grown:
    """Operands meet from the right: the tokens must be as far from there in each."""
    rank = len(shape_of(node))
    grown = [all_.grown[a] for a in node.all_input_nodes if a in all_.grown]
    right, swapped = grown[0].right, any(g.swapped for g in grown)
    if any(g.right != right for g in grown):
        raise NoRule

    def operand(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        if value in all_.grown:
            return _aligned(all_, all_.grown[value], swapped, node)
        sizes = len(shape_of(value)) if isinstance(value.meta.get("val"), Tensor) else 0
        if swapped or sizes <= right:
            return value
        return all_.state.call(aten.unsqueeze.default, (value, sizes - right), like=node)

    new = all_.call(node, [operand(a) for a in node.args])
    return Grown(shape_of(node), new, rank - right - swapped, swapped)


def _aligned(all_: ForAll, x: Grown, swapped: bool, like: fx.Node) -> fx.Node:
    """The operand as one in which the tokens take the place of a dimension, where they do so in another operand."""
    if x.swapped or not swapped or x.at == 0:
        return x.node
    if x.old[x.at - 1] != 1:
        raise NoRule
    return all_.state.call(aten.reshape.default, (x.node, all_.sized(x.old, x.at - 1, True)), like=like)


def _embedding(all_: ForAll, node: fx.Node) -> Grown:
    ids = all_.of(node.args[1])
    new = all_.call(node, (node.args[0], ids.node, *node.args[2:]))
    return Grown(shape_of(node), new, ids.at, ids.swapped)


def _first(all_: ForAll, node: fx.Node, behind: int = 1) -> Grown:
    """Ops on the last `behind` dimensions of their first argument: the tokens stand in front of those."""
    x = all_.of(node.args[0])
    if x.right < behind or any(a in all_.grown for a in node.all_input_nodes if a is not node.args[0]):
        raise NoRule
    return Grown(shape_of(node), all_.call(node, (x.node, *node.args[1:])), x.at, x.swapped)


def _norm(all_: ForAll, node: fx.Node) -> Grown:
    """`_first` over as many dimensions as it is told."""
    return _first(all_, node, len(node.args[1]))


def _matmul(all_: ForAll, node: fx.Node) -> Grown:
    x, weight = all_.of(node.args[0]), node.args[1]
    if not isinstance(weight, fx.Node) or weight in all_.grown or len(shape_of(weight)) != 2 or x.right < 1:
        raise NoRule
    new = all_.state.call(aten.matmul.default, (x.node, weight), like=node)
    return Grown(shape_of(node), new, x.at, x.swapped)


def _along(name: str) -> Callable[[ForAll, fx.Node], Grown]:
    """Ops along dimensions that are not the tokens'."""

    def rule(all_: ForAll, node: fx.Node) -> Grown:
        x = all_.of(node.args[0])
        places = signature(node.target)
        index = None if places is None else places.at.get(name)
        if index is None or len(all_.grown.keys() & set(node.all_input_nodes)) != 1:
            raise NoRule
        args = list(node.args)
        given: Any = args[index]
        dims = [given] if isinstance(given, int) else list(given or range(len(x.old)))
        moved = [x.dim(d) for d in dims]
        args[0], args[index] = x.node, moved[0] if isinstance(given, int) else moved
        gone = 0
        if len(shape_of(node)) < len(x.old):
            gone = sum(d % max(len(x.old), 1) < x.at for d in dims)
        return Grown(shape_of(node), all_.call(node, args), x.at - gone, x.swapped)

    return rule


def _slice(all_: ForAll, node: fx.Node) -> Grown:
    x = all_.of(node.args[0])
    if x.swapped and int(node.args[1]) % len(x.old) == x.at:
        return Grown(shape_of(node), x.node, x.at, True)  # the one entry there is
    return _along("dim")(all_, node)


def _select(all_: ForAll, node: fx.Node) -> Grown:
    x = all_.of(node.args[0])
    if x.swapped and int(node.args[1]) % len(x.old) == x.at:
        return Grown(shape_of(node), x.node, x.at, False)
    return _along("dim")(all_, node)


def _reshape(all_: ForAll, node: fx.Node) -> Grown:
    """The elements in front of the tokens' dimension stay in front of it."""
    x, shape = all_.of(node.args[0]), shape_of(node)
    outer = sympy.prod(x.old[: x.at])
    fits = [i for i in range(len(shape) + 1) if sympy.prod(shape[:i]) == outer]
    ones = [i for i in fits if i < len(shape) and shape[i] == 1]
    kept = len(shape) - 1 - x.right
    if ones:
        at, swapped = (kept if kept in ones else ones[0]), True
    elif fits:
        at, swapped = fits[0], False
    else:
        raise NoRule
    wanted = list(shape)
    if swapped:
        wanted[at] = all_.state.length
    else:
        wanted.insert(at, all_.state.length)
    if list(shape_of(x.node)) == wanted:
        return Grown(shape, x.node, at, swapped)
    new = all_.state.call(aten.reshape.default, (x.node, all_.sized(shape, at, swapped)), like=node)
    return Grown(shape, new, at, swapped)


def _permute(all_: ForAll, node: fx.Node) -> Grown:
    x = all_.of(node.args[0])
    rank = len(x.old)
    if op_name(node) == "aten.permute":
        order = [int(d) % rank for d in node.args[1]]
    else:
        order = list(range(rank))
        i, j = (int(d) % rank for d in node.args[1:3]) if op_name(node) == "aten.transpose" else (0, rank - 1)
        order[i], order[j] = order[j], order[i]
    at = order.index(x.at) if x.swapped else 0
    moved = order if x.swapped else [x.at, *map(x.dim, order)]
    new = all_.state.call(aten.permute.default, (x.node, moved), like=node)
    return Grown(shape_of(node), new, at, x.swapped)


def _cat(all_: ForAll, node: fx.Node) -> Grown:
    parts = [all_.of(part) for part in node.args[0]]
    if len({(p.at, p.swapped) for p in parts}) != 1:
        raise NoRule
    new = all_.call(node, ([p.node for p in parts], parts[0].dim(int(node.args[1]))))
    return Grown(shape_of(node), new, parts[0].at, parts[0].swapped)


_REDUCTIONS = ("mean", "sum", "amax", "amin", "var", "std", "logsumexp", "linalg_vector_norm", "norm")
_RULES: dict[str, Callable[[ForAll, fx.Node], Grown]] = {f"aten.{name}": _along("dim") for name in _REDUCTIONS} | {
    "aten.softmax": _along("dim"),
    "aten.log_softmax": _along("dim"),
    "aten.layer_norm": _norm,
    "aten.rms_norm": _norm,
    "aten.linear": _first,
    "aten.embedding": _embedding,
    "aten.matmul": _matmul,
    "aten.mm": _matmul,
    "aten.slice": _slice,
    "aten.select": _select,
    "aten.reshape": _reshape,
    "aten.flatten": _reshape,
    "aten.unflatten": _reshape,
    "aten.squeeze": _reshape,
    "aten.unsqueeze": _reshape,
    "aten.permute": _permute,
    "aten.transpose": _permute,
    "aten.t": _permute,
    "aten.cat": _cat,
}


def for_every_token(state: GraphState, picks: dict[fx.Node, int], tail: set[fx.Node]) -> fx.Node | None:
    """The logits of every token, with a dimension for them; None where an op between has no rule."""
    made = ForAll(state)
    try:
        for node in list(state.graph.nodes):
            if node in picks:
                made.pick(node, picks[node])
            elif node in tail:
                made.make(node)
    except NoRule:
        return None
    return made.grown[state.logits].node
