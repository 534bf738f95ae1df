"""Pieces of a text that are computed one by one and joined again: `cat([f(p) for p in x.chunk(2, dim=1)], 1)`.

Where the same is done to each piece, row by row, it is what is done to the text: the pieces are followed side by side
up to where the text was cut, and every op between is called once for all rows. An op that looks at more than a row of
a piece, or at another thing in each of them, is left as it is, and refused later on.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import shape_of
from ..framework.state import GraphState
from ..locality.token_rules import RULES
from .cut_places import Counted, dimension_before
from .sizes import refresh, same_size


def spell_joined_pieces(state: GraphState, node: fx.Node) -> bool:
    """Rewrite a `cat` of pieces along the tokens."""
    pieces: Any = node.args[0] if op_name(node) == "aten.cat" else ()
    if len(pieces) < 2:
        return False
    dim = int(argument(node, "dim")) % len(shape_of(node))
    dtype = node.meta["val"].dtype
    if not same_size(state, shape_of(node)[dim], state.length) or any(p.meta["val"].dtype != dtype for p in pieces):
        return False
    try:
        new = AllPieces(state, node).of(pieces, dim)
    except Counted:
        return False
    if not all(same_size(state, a, b) for a, b in zip(shape_of(new), shape_of(node), strict=True)):
        return False
    node.replace_all_uses_with(new)
    state.graph.erase_node(node)
    refresh(state, new)
    return True


class AllPieces:
    """Emits what is done to pieces for all of them, before the node `at`."""

    def __init__(self, state: GraphState, at: fx.Node) -> None:
        self.state, self.at = state, at
        self.tainted = set(state.closed_forms().tainted)
        self._done: dict[tuple[Any, ...], fx.Node] = {}

    def of(self, pieces: Sequence[Any], dim: int) -> fx.Node:
        """The value whose parts along `dim` these are, in order; raises Counted."""
        key = (*pieces, dim)
        if key not in self._done:
            try:
                self._done[key] = self._whole(pieces, dim)
            except Counted:
                self._done[key] = self._of_places(pieces, dim)
        return self._done[key]

    def _of_places(self, pieces: Sequence[Any], dim: int) -> fx.Node:
        """Values of places alone, such as the rows of a mask for each piece, are joined: whoever reads them proves
        what they are."""
        known = all(_is_tensor(p) and p not in self.tainted for p in pieces)
        if not known or len({p.meta["val"].dtype for p in pieces}) != 1:
            raise Counted
        return self.state.call(aten.cat.default, (list(pieces), dim), {}, like=self.at)

    def _whole(self, pieces: Sequence[Any], dim: int) -> fx.Node:
        first = pieces[0]
        if not all(isinstance(p, fx.Node) and p.op == "call_function" for p in pieces):
            raise Counted
        if any(p.target is not first.target or len(p.args) != len(first.args) for p in pieces):
            raise Counted
        if any(not _alike(p.kwargs, first.kwargs) or not isinstance(p.meta["val"], Tensor) for p in pieces):
            raise Counted
        if first.target is operator.getitem or op_name(first) == "aten.slice":
            covered = _split(pieces, dim) if first.target is operator.getitem else _slices(self.state, pieces, dim)
            if covered is not None:
                return covered
        name = op_name(first)
        if first.target is operator.getitem:
            return self._part(pieces, dim)
        rule = _RULES.get(name) or (_pointwise if RULES.get(name) is RULES["aten.add"] else None)
        if rule is None:
            raise Counted
        return self.state.call(first.target, tuple(rule(self, pieces, dim)), dict(first.kwargs), like=self.at)

    def _part(self, pieces: Sequence[fx.Node], dim: int) -> fx.Node:
        """One of several results: a part along another dimension, or an extreme and its place."""
        sources: list[Any] = [p.args[0] for p in pieces]
        name = op_name(sources[0])
        rule = _reduced if name in _EXTREMES else _along if name in _PARTED else None
        if rule is None or not all(s.target is sources[0].target and s.kwargs == sources[0].kwargs for s in sources):
            raise Counted
        several = self.state.call(
            sources[0].target, tuple(rule(self, sources, dim)), dict(sources[0].kwargs), like=self.at
        )
        return self.state.call(operator.getitem, (several, *self.same(pieces, 1)), like=self.at)

    def same(self, pieces: Sequence[fx.Node], start: int) -> list[Any]:
        """The arguments from `start` on, which must be the same for all pieces."""
        if not all(_alike(p.args[start:], pieces[0].args[start:]) for p in pieces):
            raise Counted
        return list(pieces[0].args[start:])


aten = torch.ops.aten

_EXTREMES = ("aten.max", "aten.min")
_PARTED = ("aten.split", "aten.split_with_sizes", "aten.chunk")

_Rule = Callable[[AllPieces, Sequence[fx.Node], int], list[Any]]


def _split(pieces: Sequence[fx.Node], dim: int) -> fx.Node | None:
    """All pieces of one split."""
    cut: Any = pieces[0].args[0]
    in_order = [p.args for p in pieces] == [(cut, i) for i in range(len(pieces))]
    if not in_order or op_name(cut) not in ("aten.split", "aten.split_with_sizes", "aten.chunk"):
        return None
    source: Any = cut.args[0]
    whole = len(cut.meta["val"]) == len(pieces) and int(argument(cut, "dim")) % len(shape_of(source)) == dim
    return source if whole else None


def _slices(state: GraphState, pieces: Sequence[fx.Node], dim: int) -> fx.Node | None:
    """Slices of one value, each from where the one before it ends."""
    source: Any = pieces[0].args[0]
    place: Any = sympy.Integer(0)
    for piece in pieces:
        along = int(argument(piece, "dim")) % len(shape_of(piece))
        if piece.args[0] is not source or along != dim or argument(piece, "step") != 1:
            return None
        if not same_size(state, _size(argument(piece, "start") or 0), place):
            return None
        place = place + shape_of(piece)[dim]
    return source if same_size(state, place, shape_of(source)[dim]) else None


def _size(value: Any) -> Any:
    return value.meta["val"].node.expr if isinstance(value, fx.Node) else sympy.Integer(value)


def _pointwise(whole: AllPieces, pieces: Sequence[fx.Node], dim: int) -> list[Any]:
    rank = len(shape_of(pieces[0]))
    found: list[Any] = []
    for operands in zip(*(p.args for p in pieces), strict=True):
        first = operands[0]
        place = dim - rank + len(shape_of(first)) if _is_tensor(first) else -1
        alike = all(_alike(o, first) for o in operands)
        if place < 0 and not alike:
            raise Counted
        broadcast = place < 0 or (alike and shape_of(first)[place] == 1)
        found.append(first if broadcast else whole.of(operands, place))
    return found


def _moved(whole: AllPieces, pieces: Sequence[fx.Node], dim: int) -> list[Any]:
    return [whole.of([p.args[0] for p in pieces], dimension_before(pieces[0], dim)), *whole.same(pieces, 1)]


def _rows(whole: AllPieces, pieces: Sequence[fx.Node], dim: int) -> list[Any]:
    """Of the first operand, where the last dimension is another one."""
    if dim == len(shape_of(pieces[0])) - 1:
        raise Counted
    return [whole.of([p.args[0] for p in pieces], dim), *whole.same(pieces, 1)]


def _product(whole: AllPieces, pieces: Sequence[fx.Node], dim: int) -> list[Any]:
    """Of the rows of the first operand, which has all dimensions of the result."""
    rank = len(shape_of(pieces[0]))
    if dim != rank - 2 or any(len(shape_of(p.args[0])) != rank for p in pieces):
        raise Counted
    return _rows(whole, pieces, dim)


def _normalised(whole: AllPieces, pieces: Sequence[fx.Node], dim: int) -> list[Any]:
    over: Any = pieces[0].args[1]
    if dim >= len(shape_of(pieces[0])) - len(over):
        raise Counted
    return _rows(whole, pieces, dim)


def _along(whole: AllPieces, pieces: Sequence[fx.Node], dim: int) -> list[Any]:
    """An op along another dimension, which keeps all of them."""
    over: Any = argument(pieces[0], "dim")
    if not isinstance(over, int) or over % len(shape_of(pieces[0].args[0])) == dim:
        raise Counted
    return [whole.of([p.args[0] for p in pieces], dim), *whole.same(pieces, 1)]


def _reduced(whole: AllPieces, pieces: Sequence[fx.Node], dim: int) -> list[Any]:
    """A sum, mean or extreme over other dimensions, which stay as ones or go."""
    rank = len(shape_of(pieces[0].args[0]))
    asked: Any = argument(pieces[0], "dim")
    if asked is None or asked == []:
        raise Counted
    gone = {int(d) % rank for d in (asked if isinstance(asked, (list, tuple)) else [asked])}
    kept = list(range(rank)) if argument(pieces[0], "keepdim") else [d for d in range(rank) if d not in gone]
    if kept[dim] in gone:
        raise Counted
    return [whole.of([p.args[0] for p in pieces], kept[dim]), *whole.same(pieces, 1)]


def _reshaped(whole: AllPieces, pieces: Sequence[fx.Node], dim: int) -> list[Any]:
    """Where as many elements stand in front of the pieces' rows, and behind them, as before."""
    source, sizes = pieces[0].args[0], pieces[0].args[1]
    before, after = shape_of(source), shape_of(pieces[0])
    front, rows = sympy.prod(after[:dim]), after[dim]
    found = [i for i, s in enumerate(before) if s == rows and sympy.prod(before[:i]) == front]
    behind = [p.args[1][dim + 1 :] for p in pieces]
    if len(found) != 1 or not all(
        _alike((p.args[1][:dim], b), (sizes[:dim], behind[0])) for p, b in zip(pieces, behind)
    ):
        raise Counted
    new = whole.of([p.args[0] for p in pieces], found[0])
    length = whole.state.call(aten.sym_size.int, (new, found[0]), like=whole.at)
    return [new, [*sizes[:dim], length, *sizes[dim + 1 :]]]


def _joined(whole: AllPieces, pieces: Sequence[fx.Node], dim: int) -> list[Any]:
    """A `cat` along another dimension."""
    parts: list[Any] = [p.args[0] for p in pieces]
    if int(argument(pieces[0], "dim")) % len(shape_of(pieces[0])) == dim or len({len(p) for p in parts}) != 1:
        raise Counted
    return [[whole.of(part, dim) for part in zip(*parts, strict=True)], *whole.same(pieces, 1)]


def _attention(whole: AllPieces, pieces: Sequence[fx.Node], dim: int) -> list[Any]:
    """Of the queries, under the rows of a mask that are theirs."""
    first = pieces[0]
    masks = [argument(p, "attn_mask") for p in pieces]
    if dim != len(shape_of(first)) - 2 or argument(first, "is_causal") or not all(map(_is_tensor, masks)):
        raise Counted
    queries = whole.of([p.args[0] for p in pieces], dim)
    if not all(_alike((p.args[1:3], p.args[4:]), (first.args[1:3], first.args[4:])) for p in pieces):
        raise Counted
    rows = whole.of(masks, len(shape_of(masks[0])) - 2)
    return [queries, *first.args[1:3], rows, *first.args[4:]]


def _alike(a: Any, b: Any, depth: int = 8) -> bool:
    """Whether two arguments are the same, or computed in the same few steps from the same values."""
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        if a is b or depth == 0:
            return a is b
        known = a.op == b.op == "call_function" and a.target is b.target
        drawn = torch.Tag.nondeterministic_seeded in getattr(a.target, "tags", ())
        return known and not drawn and _alike((a.args, a.kwargs), (b.args, b.kwargs), depth - 1)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_alike(x, y, depth) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[k], b[k], depth) for k in a)
    return type(a) is type(b) and bool(a == b)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)


_RULES: dict[str, _Rule] = {
    "aten.linear": _rows,
    "aten.matmul": _product,
    "aten.bmm": _product,
    "aten.layer_norm": _normalised,
    "aten.rms_norm": _normalised,
    "aten.softmax": _along,
    "aten.log_softmax": _along,
    **dict.fromkeys(("aten.amax", "aten.amin", "aten.sum", "aten.mean", "aten.logsumexp", "aten.var"), _reduced),
    "aten.reshape": _reshaped,
    "aten.cat": _joined,
    "aten.slice": _along,
    "aten.unsqueeze": _moved,
    "aten.squeeze": _moved,
    "aten.transpose": _moved,
    "aten.permute": _moved,
    "aten.scaled_dot_product_attention": _attention,
}
