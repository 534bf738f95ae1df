"""Values whose rows are the tokens' and others', in front or behind: each part is computed for itself.

In front: n rows of constants (a soft prompt, a beginning of text). They must not see the tokens, and so are constants
in every layer; the tokens see both. Behind: rows that fill the text up to some length. The tokens must not see them,
and they may see everything, so they are not computed at all.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import ClosedForms, axis, shape_of
from ..framework.state import GraphState
from ..locality.axes import Axis, Mixes
from ..locality.token_rules import RULES
from .beside import Beside, beside_of, joined, joins, padded

aten = torch.ops.aten

_SIZED = ("aten.reshape", "aten.expand")
_KEEPS_HIDDEN = frozenset({
    "aten._to_copy", "aten.reshape", "aten.expand", "aten.transpose", "aten.permute", "aten.unsqueeze", "aten.squeeze",
    "aten.unflatten", "aten.flatten",
})  # fmt: skip
_MADE = ("aten.full", "aten.ones", "aten.zeros", "aten.new_ones", "aten.new_zeros", "aten.new_full", "aten.arange")


@dataclass(frozen=True)
class ApartRows:
    """The tokens' rows of a value, and the others' (None: nobody needs them), in dimension `at`.

    Scores have keys in dimension `keys`: all of them for the tokens where others stand in front, else their own.
    """

    tokens: fx.Node
    others: fx.Node | None
    at: int
    keys: int | None = None
    hidden: bool = False
    """Whether these are scores whose later part, of keys that must not be seen, is proved to be hidden."""
    weighted: bool = False


class Stop(Exception):
    """An op that cannot be computed apart."""


ApartRule = Callable[["Apart", fx.Node], ApartRows | None]


class Apart:
    def __init__(self, state: GraphState, beside: Beside, rules: Mapping[str, ApartRule]) -> None:
        self.state, self.beside, self.rules = state, beside, rules
        self.forms: ClosedForms = state.closed_forms()
        self.tainted = set(self.forms.tainted)
        self.rows: dict[fx.Node, ApartRows] = {}
        self.axes: dict[fx.Node, Axis] = {}
        self.length = beside.whole
        self.matches = 0

    def rewrite(self) -> int:
        for node in list(self.state.graph.nodes):
            if node.op != "call_function" or not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
                continue
            try:
                self._visit(node)
            except (Stop, Mixes, AssertionError, RuntimeError, ValueError, IndexError, TypeError):
                continue
        self.state.clean()
        self._drop_dead()
        self.state.clean()
        if self.matches:
            self.state.rewritten()
        return self.matches

    def _drop_dead(self) -> None:
        """NOTE dead-code elimination keeps attention: an op that may be random counts as impure."""
        for node in reversed(list(self.state.graph.nodes)):
            own = node in self.rows or op_name(node) == "aten.scaled_dot_product_attention"
            if self.rows and own and not node.users:
                self.state.graph.erase_node(node)

    def _visit(self, node: fx.Node) -> None:
        held = [a for a in node.all_input_nodes if a in self.rows]
        if not held:
            found = self._base(node)
        elif op_name(node) in self.rules:
            found = self.rules[op_name(node)](self, node)
        else:
            found = self.alone(node)
        if found is not None:
            self.rows[node] = found

    # ------------------------------------------------------------------ where rows come from

    def _base(self, node: fx.Node) -> ApartRows | None:
        """Tokens joined with others, or a value over all places."""
        if node in self.tainted:
            return self._join(node)
        if not isinstance(node.meta["val"], Tensor):
            return None
        places = [i for i, s in enumerate(shape_of(node)) if s == self.beside.whole]
        if len(places) != 1 or len(shape_of(node)) > 4:
            return None
        return self._table(node, places[0]) if op_name(node) == "aten.slice" else self._made(node, places[0])

    def _join(self, node: fx.Node) -> ApartRows | None:
        found = beside_of(self.state, self.tainted, node) if joins(node) else None
        if found != self.beside:
            return None
        source, at, front = (joined(self.tainted, node) if op_name(node) == "aten.cat" else padded(node)) or (0, 0, 0)
        assert isinstance(source, fx.Node)
        return ApartRows(source, self._others_of(node, source, at) if front else None, at)

    def _others_of(self, node: fx.Node, source: fx.Node, at: int) -> fx.Node:
        if op_name(node) == "aten.cat":
            pieces: Any = node.args[0]
            return pieces[0] if len(pieces) == 2 else self.emit(node, aten.cat.default, list(pieces[:-1]), at)
        sizes = [self.beside.count if i == at else self.size(node, s) for i, s in enumerate(shape_of(node))]
        value = argument(node, "value")
        kind = {"dtype": node.meta["val"].dtype, "device": node.meta["val"].device}
        return self.emit(node, aten.full.default, sizes, 0 if value is None else value, **kind)

    def size(self, node: fx.Node, size: sympy.Expr) -> int:
        if not size.is_Integer:
            raise Stop
        return int(size)

    def _made(self, node: fx.Node, at: int) -> ApartRows | None:
        """arange, or the same number at all places."""
        if op_name(node) not in _MADE:
            return None
        tokens = self.part(node.next, node, at)
        if not self.beside.front:
            return ApartRows(tokens, None, at)
        if op_name(node) == "aten.arange":
            kind = {"dtype": node.meta["val"].dtype, "device": node.meta["val"].device}
            first = self.forms.of(node)
            if first is None or sympy.expand(first.expr - axis(0)) != 0:
                return None
            return ApartRows(tokens, self.emit(node, aten.arange.default, self.beside.count, **kind), at)
        args: Any = list(node.args)
        where = 1 if op_name(node).startswith("aten.new_") else 0
        args[where] = [self.beside.count if i == at else s for i, s in enumerate(args[where])]
        return ApartRows(tokens, self.emit(node, node.target, *args, **dict(node.kwargs)), at)

    def _table(self, node: fx.Node, at: int) -> ApartRows | None:
        """The first rows of a table."""
        source, dim, start, _, step = node.args
        assert isinstance(source, fx.Node) and isinstance(dim, int)
        start = 0 if start is None else start
        if step != 1 or dim % len(shape_of(node)) != at or not isinstance(start, int) or start < 0:
            return None
        if not shape_of(source)[at].is_Integer:
            return None
        n = self.beside.count if self.beside.front else 0
        stop = self.emit_size(operator.add, node, self.tokens_size(node), start + n)
        tokens = self.emit(node, aten.slice.Tensor, source, at, start + n, stop)
        others = self.emit(node, aten.slice.Tensor, source, at, start, start + n) if n else None
        return ApartRows(tokens, others, at)

    # ------------------------------------------------------------------ through ops

    def alone(self, node: fx.Node) -> ApartRows | None:
        """An op that acts on each row alone."""
        held = [self.rows[a] for a in node.all_input_nodes if a in self.rows]
        if any(r.weighted != held[0].weighted for r in held):
            return None
        scores = [r for r in held if r.keys is not None]
        at = self._axis(node, {a: self.rows[a].at for a in node.all_input_nodes if a in self.rows})
        keys, hidden = None, False
        if scores:
            if len(scores) != len(held):
                return None
            keys = self._axis(node, {a: self.rows[a].keys for a in node.all_input_nodes if a in self.rows})
            hidden = all(r.hidden for r in scores) and op_name(node) in _KEEPS_HIDDEN
        tokens = self._again(node, (at, keys), tokens=True)
        others = None if held[0].others is None else self._again(node, (at, keys), tokens=False)
        return replace(held[0], tokens=tokens, others=others, at=at, keys=keys, hidden=hidden)

    def _axis(self, node: fx.Node, axes: dict[fx.Node, Any]) -> int:
        """Where a dimension of all rows stands after an op that acts on each of them alone; raises Mixes."""
        self.axes = {a: axes.get(a) for a in node.all_input_nodes}
        rule = RULES.get(op_name(node))
        at = None if rule is None else rule(node, self)
        if at is None:
            raise Stop
        return at

    def _again(self, node: fx.Node, places: tuple[int, int | None], tokens: bool) -> fx.Node:
        """The op on the tokens' rows, or on the others'; `places`: where rows and keys stand in the result."""

        def mine(a: fx.Node) -> Any:
            if a in self.rows:
                part = self.rows[a].tokens if tokens else self.rows[a].others
                if part is None:
                    raise Stop
                return part
            value = a.meta.get("val")
            if isinstance(value, Tensor) and any(s == self.beside.whole for s in shape_of(a)):
                raise Stop
            return a

        args = list(fx.node.map_arg(tuple(node.args), mine))
        if op_name(node) in _SIZED:
            own = self.tokens_size(node) if tokens else self.beside.count
            sizes = {places[0]: own} | ({} if places[1] is None or (tokens and self.beside.front) else {places[1]: own})
            args[1] = [sizes.get(i, s) if s != -1 else s for i, s in enumerate(args[1])]
        return self.emit(node, node.target, *args, **fx.node.map_arg(dict(node.kwargs), mine))

    def tokens_size(self, node: fx.Node) -> Any:
        """The number of rows of the tokens, as an argument."""
        if self.beside.length == self.state.length:
            return self.emit(node, torch.ops.aten.sym_size.int, self.state.node(self.state.tokens), 1)
        source = next(r for r in self.rows.values() if shape_of(r.tokens)[r.at] == self.beside.length)
        return self.emit(node, torch.ops.aten.sym_size.int, source.tokens, source.at)

    def part(self, reader: fx.Node, node: fx.Node, at: int) -> fx.Node:
        """The tokens' places of a value over all of them."""
        if not self.beside.front:
            return self.emit(reader, aten.slice.Tensor, node, at, 0, self.tokens_size(reader))
        end = self.emit(reader, torch.ops.aten.sym_size.int, node, at)
        return self.emit(reader, aten.slice.Tensor, node, at, self.beside.count, end)

    def emit(self, at: fx.Node, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.state.call(op, args, kwargs, like=at)

    def emit_size(self, op: Any, at: fx.Node, a: Any, b: Any) -> Any:
        """Arithmetic on sizes."""
        if not isinstance(a, fx.Node) or b == 0:
            return op(a, b) if b != 0 else a
        with self.state.graph.inserting_before(at):
            node = self.state.graph.call_function(op, (a, b))
        node.meta["val"] = op(a.meta["val"], b)
        return node
