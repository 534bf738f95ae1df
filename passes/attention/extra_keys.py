"""Keys and values that are not the tokens', joined to theirs: a learned key beside them, a key of zeros, a memory.

    attention(q, [k, k'], [v, v'])    with k', v' constant

is written as attention to the tokens and a sink, and the constants' own part. With s the scores of the tokens, c those
of the constants and C = log sum exp c, all scores less C give the same weights, and the constants weigh as much as one
score of 0: the weights of the tokens are softmax([s - C, 0]) without its last column, what is left of 1 goes to
softmax(c) v'. Values with a dimension of tokens and constants are followed through every op that acts on each of them
alone, and computed for both apart.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from treespec_compiler.errors import Refusal
from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import ClosedForms, shape_of
from ..framework.state import GraphState, refuse
from ..locality.axes import Axis, Mixes
from ..locality.token_rules import RULES
from .by_place import rows_by_place
from .spelled_out import SOFTMAXES
from .weight_path import PRODUCTS

aten = torch.ops.aten

_SIZED = ("aten.reshape", "aten.expand")  # the sizes of the result are argument 1
# What may be done to weights, of which `Parts` hold the scores: the softmax is taken of what is laid out anew.
_LAYS_OUT = ("aten.reshape", "aten.unsqueeze", "aten.squeeze", "aten.expand")
_ADDS = ("aten.add", "aten.sub", "aten.baddbmm", "aten.scaled_dot_product_attention")


@dataclass(frozen=True)
class Parts:
    """The values of the tokens and of the constants in dimension `at`."""

    tokens: fx.Node
    constants: fx.Node
    at: int
    count: int
    """How many constants there are,"""
    front: bool
    """and whether they come first."""
    weighted: bool = False
    """Whether these are scores of a softmax that has been taken: what is asked for are its weights."""


class ExtraKeys:
    """Follows dimensions that hold the tokens and constants, in front of them or behind."""

    def __init__(self, state: GraphState, forms: ClosedForms) -> None:
        self.state, self.forms = state, forms
        self.tainted = set(forms.tainted)
        self.axes: dict[fx.Node, Axis] = {}
        self.length: sympy.Expr = state.length
        self.parts: dict[fx.Node, Parts] = {}
        self.matches = 0

    def rewrite(self) -> int:
        """Rewrite every attention to tokens and constants; returns how many."""
        for node in list(self.state.graph.nodes):
            if node.op != "call_function" or not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
                continue
            found = self._joined(node) if op_name(node) == "aten.cat" else None
            if found is not None:
                self.parts[node] = found
            elif any(a in self.parts for a in node.all_input_nodes):
                self._follow(node)
        return self.matches

    def _joined(self, node: fx.Node) -> Parts | None:
        """A `cat` of tokens and of constants, or of such a one and of more constants on the same side."""
        pieces: Any = node.args[0]
        at = int(argument(node, "dim")) % len(shape_of(node))
        if len(pieces) != 2:
            return None
        for front, (constants, tokens) in enumerate((pieces[::-1], pieces)):
            size = shape_of(constants)[at]
            if constants in self.tainted or not size.is_Integer or size < 1:
                continue
            inner = self.parts.get(tokens)
            if inner is None and tokens in self.tainted and shape_of(tokens)[at] == self.state.length:
                return Parts(tokens, constants, at, int(size), bool(front))
            if inner is not None and inner.at == at and inner.front == bool(front) and not inner.weighted:
                both = [constants, inner.constants] if front else [inner.constants, constants]
                joined = self.emit(node, aten.cat.default, both, at)
                return Parts(inner.tokens, joined, at, inner.count + int(size), bool(front))
        return None

    def _follow(self, node: fx.Node) -> None:
        name = op_name(node)
        if name == "aten.scaled_dot_product_attention":
            self._finish(node, self._fused(node))
        elif name in PRODUCTS:
            self._product(node, node.args[0], node.args[1])
        elif name == "aten.baddbmm" and argument(node, "alpha") == argument(node, "beta") == 1:
            self._product(node, node.args[1], node.args[2], mask=node.args[0])
        elif name in SOFTMAXES:
            source = self.parts[node.args[0]]
            dim = int(argument(node, "dim")) % len(shape_of(node))
            if dim == source.at == len(shape_of(node)) - 1:
                self.parts[node] = replace(source, weighted=True)
        else:
            self._apart(node)

    def _product(self, node: fx.Node, a: Any, b: Any, mask: Any = None) -> None:
        left, right = self.parts.get(a), self.parts.get(b)
        if right is None:
            return
        last, row = len(shape_of(b)) - 1, len(shape_of(b)) - 2
        if left is not None and left.weighted and left.at == len(shape_of(a)) - 1 and right.at == row and mask is None:
            if (left.count, left.front) == (right.count, right.front):
                self._finish(node, self._attended(node, left.tokens, left.constants, right))
        elif left is None and right.at == last:
            made = []
            for part, tokens in ((right.tokens, True), (right.constants, False)):
                scores = self.emit(node, aten.matmul.default, a, part)
                made.append(scores if mask is None else self._masked(node, scores, mask, right, tokens))
            self.parts[node] = replace(right, tokens=made[0], constants=made[1], at=len(shape_of(node)) - 1)

    def _apart(self, node: fx.Node) -> None:
        """An op that acts on tokens and constants alone, on each of them."""
        held = [self.parts[a] for a in node.all_input_nodes if a in self.parts]
        weighted = any(p.weighted for p in held)
        if len({(p.count, p.front) for p in held}) != 1 or (weighted and op_name(node) not in _LAYS_OUT):
            return
        self.length = self.state.length + held[0].count
        self.axes = {a: self.parts[a].at if a in self.parts else None for a in node.all_input_nodes}
        rule = RULES.get(op_name(node))
        try:
            at = None if rule is None else rule(node, self)
        except (Mixes, AssertionError):
            return
        if at is None:
            return
        first, second = (self._again(node, at, held[0], tokens) for tokens in (True, False))
        if first is not None and second is not None:
            self.parts[node] = replace(held[0], tokens=first, constants=second, at=at)

    def _again(self, node: fx.Node, at: int, like: Parts, tokens: bool) -> fx.Node | None:
        """The op on the tokens' values, or on the constants'."""
        rank = len(shape_of(node)) if isinstance(node.meta["val"], Tensor) else 0

        def mine(a: fx.Node) -> Any:
            if a in self.parts:
                return self.parts[a].tokens if tokens else self.parts[a].constants
            if not isinstance(a.meta.get("val"), Tensor):
                return a
            place = at - (rank - len(shape_of(a)))
            if RULES.get(op_name(node)) is not RULES["aten.add"] or place < 0 or shape_of(a)[place] != self.length:
                return a
            return self._part(a, place, like, tokens, node)

        args = list(fx.node.map_arg(tuple(node.args), mine))
        if op_name(node) in _SIZED:
            args[1] = [(self._tokens(node) if tokens else like.count) if i == at else s for i, s in enumerate(args[1])]
        if not tokens and (seen := self._unmasked(op_name(node), args)) is not None:
            return seen
        try:
            return self.emit(node, node.target, *args, **fx.node.map_arg(dict(node.kwargs), mine))
        except (RuntimeError, ValueError, IndexError):
            return None

    def _part(self, node: fx.Node, at: int, like: Parts, tokens: bool, reader: fx.Node) -> fx.Node:
        """`_cut`; what is added to the constants' scores by each query's place is read from a table."""
        part = self._cut(node, at, like, tokens, reader)
        if tokens or op_name(reader) not in _ADDS or at != len(shape_of(node)) - 1 or node in self.tainted:
            return part
        form = self.state.closed_forms().of(part)
        same = form is not None and form.expr.is_number
        return part if same else rows_by_place(self.state, part, reader) or part

    def _cut(self, node: fx.Node, at: int, like: Parts, tokens: bool, reader: fx.Node) -> fx.Node:
        """The tokens' or the constants' part of a value that was not put together, such as a mask."""
        length = self._tokens(reader)
        end = self.emit(reader, torch.ops.aten.sym_size.int, node, at)
        if like.front:
            start, stop = (like.count, end) if tokens else (0, like.count)
        else:
            start, stop = (0, length) if tokens else (length, end)
        return self.emit(reader, aten.slice.Tensor, node, at, start, stop)

    def _tokens(self, reader: fx.Node) -> fx.Node:
        return self.emit(reader, aten.sym_size.int, self.state.node(self.state.tokens), 1)

    def _fused(self, node: fx.Node) -> fx.Node | None:
        """scaled_dot_product_attention, written out."""
        q, k, v = (argument(node, name) for name in ("query", "key", "value"))
        mask, scale = argument(node, "attn_mask"), argument(node, "scale")
        keys, values = self.parts.get(k), self.parts.get(v)
        if (
            keys is None
            or values is None
            or (keys.count, keys.front) != (values.count, values.front)
            or q in self.parts
            or argument(node, "dropout_p")
        ):
            return None
        if argument(node, "is_causal") or argument(node, "enable_gqa") or keys.at != len(shape_of(k)) - 2:
            return None
        scale = 1.0 / math.sqrt(int(shape_of(q)[-1])) if scale is None else scale
        scores = []
        for tokens in (True, False):
            part = keys.tokens if tokens else keys.constants
            made = self.emit(node, aten.matmul.default, q, self.emit(node, aten.transpose.int, part, -2, -1))
            made = self.emit(node, aten.mul.Tensor, made, scale)
            if mask is not None:
                made = self._masked(node, made, mask, keys, tokens)
            scores.append(made)
        return self._attended(node, scores[0], scores[1], values)

    def _masked(self, node: fx.Node, scores: fx.Node, mask: fx.Node, like: Parts, tokens: bool) -> fx.Node:
        whole, last = self.state.length + like.count, len(shape_of(mask)) - 1
        part = self._part(mask, last, like, tokens, node) if shape_of(mask)[last] == whole else mask
        if not tokens and self._shows(part):
            return scores
        if not tokens and self._value(part) in (sympy.false, -sympy.oo):
            raise refuse(Refusal.ATTENTION, "keys that stand beside the tokens' own are hidden from all of them", node)
        if mask.meta["val"].dtype is not torch.bool:
            return self.emit(node, aten.add.Tensor, scores, part)
        hidden = self.emit(node, aten.logical_not.default, part)
        return self.emit(node, aten.masked_fill.Scalar, scores, hidden, -math.inf)

    def _unmasked(self, name: str, args: list[Any]) -> fx.Node | None:
        """The scores of constants, where a mask is known to hide none of them."""
        if name == "aten.masked_fill" and self._value(args[1]) == sympy.false:
            return args[0]
        if name == "aten.where" and len(args) == 3 and self._value(args[0]) == sympy.true:
            return args[1]
        if name == "aten.where" and len(args) == 3 and self._value(args[0]) == sympy.false:
            return args[2]
        if name == "aten.add" and self._value(args[1]) == 0 and shape_of(args[0])[-1] == shape_of(args[1])[-1]:
            return args[0]
        return None

    def _value(self, node: Any) -> Any:
        """The one value of a mask, where it is known."""
        if not isinstance(node, fx.Node) or node in self.parts or len(shape_of(node)) < 2:
            return None
        form = self.state.closed_forms().of(node)
        return None if form is None else form.expr

    def _shows(self, mask: fx.Node) -> bool:
        """Whether a mask is known to change nothing."""
        form = self.state.closed_forms().of(mask)
        return form is not None and form.expr == (sympy.true if form.is_bool else 0)

    def _attended(self, at: fx.Node, scores: fx.Node, constant: fx.Node, values: Parts) -> fx.Node:
        """Attention with scores [.., T, T] of tokens and [.., T, n] of constants."""
        emit = functools.partial(self.emit, at)
        total = emit(aten.logsumexp.default, constant, [-1], True)
        shifted = emit(aten.sub.Tensor, scores, total)
        joined = emit(aten.cat.default, [shifted, self._column(at, scores)], -1)
        weights = emit(aten.slice.Tensor, emit(aten.softmax.int, joined, -1), -1, 0, -1)
        width = int(shape_of(values.tokens)[-1])
        one = emit(aten.ones_like.default, emit(aten.slice.Tensor, values.tokens, -1, 0, 1))
        out = emit(aten.matmul.default, weights, emit(aten.cat.default, [values.tokens, one], -1))
        rest = emit(aten.rsub.Scalar, emit(aten.slice.Tensor, out, -1, width, width + 1), 1)
        own = emit(aten.matmul.default, emit(aten.softmax.int, constant, -1), values.constants)
        out = emit(aten.slice.Tensor, out, -1, 0, width)
        return emit(aten.add.Tensor, out, emit(aten.mul.Tensor, rest, own))

    def _column(self, at: fx.Node, scores: fx.Node) -> fx.Node:
        """[.., T, 1] zeros beside the scores, the same for every query."""
        value, shape = scores.meta["val"], shape_of(scores)
        sizes: list[Any] = [int(s) if s.is_Integer else self._tokens(at) for s in shape[:-1]]
        ones = [int(s) if s.is_Integer else 1 for s in shape[:-1]]
        zeros = self.state.call(
            aten.zeros.default, ([*ones, 1],), {"dtype": value.dtype, "device": value.device}, like=at
        )
        return self.emit(at, aten.expand.default, zeros, [*sizes, 1])

    def _finish(self, node: fx.Node, new: fx.Node | None) -> None:
        if new is None or shape_of(new) != shape_of(node):
            return
        node.replace_all_uses_with(new)
        self.state.graph.erase_node(node)
        self.matches += 1

    def emit(self, at: fx.Node, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.state.call(op, args, kwargs, like=at)


def spell_extra_keys(state: GraphState) -> int:
    """Write attention to tokens and constants as attention to the tokens alone; returns how many were."""
    matches = ExtraKeys(state, state.closed_forms()).rewrite()
    if matches:
        state.clean()
        state.rewritten()
    return matches
