"""recognize attention, spelled out: matmul, softmax, matmul becomes one `treespec::attention`.

Read backwards from the softmax, the scores are a chain of operations on one product q k^T. Each is folded into what is
known so far: a factor on the product, a softcap, an additive mask or bias (any value that does not depend on token
content), a condition that overrides scores, a sink column. An operation that fits nowhere ends the attempt; the softmax
is then left alone, and token locality judges it. What is constant along a row is left out, since a softmax does not see
it; one with sinks does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import ClosedForms, shape_of
from ..forms.masks import HIDDEN
from ..framework.state import GraphState
from .key_bias import Splitter
from .padding import Conditions
from .relative import RelativeTerm, relative_term
from .sink_gate import sink_gate
from .weight_path import PRODUCTS, follow, zeros_and_ones

aten = torch.ops.aten

SOFTMAXES = ("aten.softmax", "aten._softmax", "aten._safe_softmax")
_LOWEST = -1e30


@dataclass(frozen=True)
class Scores:
    """softcap(scale * q k^T) + mask, before the softmax; `inner` is the scale inside a tanh that is still open, and
    `shifted` says that something constant along each row was left out."""

    q: fx.Node
    k_transposed: fx.Node
    scale: float = 1.0
    inner: float | None = None
    softcap: float = 0.0
    mask: fx.Node | None = None
    sinks: fx.Node | None = None
    shifted: bool = False
    shift: fx.Node | None = None
    """[.., T, 1], computed from tokens, that was added to each row; None where `shifted` says all of it."""
    replaced: tuple[fx.Node, ...] = ()
    """Where scores were replaced by a value that hides nothing by itself: the mask must hide it there."""
    key_bias: fx.Node | None = None
    """[.., heads, 1, T], computed from the keys' tokens."""
    padding: fx.Node | None = None
    """[.., 1, T]: keys that are hidden by their token."""
    nulled: bool = False
    """Whether the mask hides where a score was set to 0, of which an activation makes 0 (`pointwise`)."""
    relative: RelativeTerm | None = None


@dataclass(frozen=True)
class EagerSite:
    """One attention: its scores, the softmax, and the product with V that ends it."""

    scores: Scores
    softmax: fx.Node
    values: fx.Node
    output: fx.Node


class Reader:
    """Parses the scores of one softmax. Nodes it makes (combined masks) are dead code if the attempt fails."""

    def __init__(self, state: GraphState, forms: ClosedForms, repeated: Callable[[fx.Node], fx.Node | None]) -> None:
        self.state, self.forms, self.repeated = state, forms, repeated
        self.rounded: fx.Node | None = None
        """What rounds scores or weights to a type that holds less than the queries': attention would leave it out."""

    def keeps(self, queries: fx.Node, node: fx.Node) -> bool:
        """Whether the type of `node` holds what the queries' does."""
        if _rounds(queries, node):
            self.rounded = node
        return not _rounds(queries, node)

    def site(self, softmax: fx.Node) -> EagerSite | None:
        dim: Any = argument(softmax, "dim")
        if dim not in (-1, _rank(softmax) - 1):
            return None
        path = follow(self.state, self.forms, softmax)
        if path is None:
            return None
        output = path.output
        self.at = softmax
        scores = self.read(softmax.args[0])
        kept = scores is not None and all(self.keeps(scores.q, n) for n in (softmax, *path.steps))
        if scores is None or not kept or scores.inner is not None or (scores.sinks is not None) != path.dropped:
            return None
        if scores.sinks is not None and scores.shift is not None and scores.softcap:
            return None
        scores = replace(scores, replaced=(*scores.replaced, *path.zeroed))
        gate = sink_gate(softmax, output, self.forms, self.state.length)
        if gate is not None and scores.sinks is None and not scores.shifted:
            scores, output = replace(scores, sinks=gate[0]), gate[1]
        return EagerSite(scores, softmax, path.values, output)

    at: fx.Node  # new nodes are inserted before this one

    def _depends(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node in self.forms.tainted

    def read(self, node: Any) -> Scores | None:
        """The scores computed by `node`, or None."""
        if not isinstance(node, fx.Node) or not self._depends(node):
            return None
        name = op_name(node)
        if name in PRODUCTS:
            a, b = node.args[:2]
            both = self._depends(a) and self._depends(b)
            return Scores(a, b) if both else None
        rule = _RULES.get(name)
        return rule(self, node) if rule is not None else None

    def number(self, value: Any) -> float | None:
        """A Python number, or the value of a 0-d or one-element constant."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        form = self.forms.of(value) if isinstance(value, fx.Node) and value not in self.forms.tainted else None
        if form is not None and all(s == 1 for s in form.shape) and form.expr.is_number:
            return float(form.expr)
        return None

    def add(self, scores: Scores, extra: Any, sign: int = 1) -> Scores | None:
        """scores + sign * extra, for an addend that does not depend on token content, but for a bias by key."""
        if scores.inner is not None or scores.sinks is not None:
            return None
        if isinstance(extra, (int, float)):
            return replace(scores, shifted=True)
        if self.shifts(scores, extra):
            return self.shift(scores, extra, sign)
        if self._depends(extra):
            found = Splitter(self.state, self.forms, self.at, self.repeated).split(extra)
            if found is None:
                return self.relative(scores, extra, sign)
            if sign < 0 or (found.bias is not None and scores.key_bias is not None):
                return None
            bias = scores.key_bias if found.bias is None else found.bias
            scores = self.padded(replace(scores, key_bias=bias), found.padding)
            if found.mask is None:
                return scores
            extra = found.mask
        if sign < 0:
            extra = self.emit(aten.neg.default, extra)
        mask = extra if scores.mask is None else self.emit(aten.add.Tensor, scores.mask, extra)
        return replace(scores, mask=mask)

    def relative(self, scores: Scores, extra: Any, sign: int) -> Scores | None:
        """scores + sign * extra, for a query's product with a vector of the distance, and what is added to it."""
        if op_name(extra) == "aten.neg":
            return self.add(scores, extra.args[0], -sign)
        if op_name(extra) == "aten.add" and argument(extra, "alpha") == 1:
            first = self.add(scores, extra.args[0], sign)
            return None if first is None else self.add(first, extra.args[1], sign)
        term = relative_term(self.state, self.forms, extra, self.at) if scores.relative is None else None
        if term is None:
            return None
        made = replace(scores, relative=term)
        return made if sign > 0 else _relative_scaled(self, made, -1.0)

    def shifts(self, scores: Scores, extra: Any) -> bool:
        """Whether an addend is one number for each query, computed from tokens: a softmax does not see it."""
        if scores.inner is not None or scores.sinks is not None or not self._depends(extra):
            return False
        shape = shape_of(extra)
        return len(shape) >= 2 and shape[-1] == 1

    def shift(self, scores: Scores, extra: Any, sign: int) -> Scores:
        """NOTE remembered for sinks, which are no part of what is shifted; several shifts are not."""
        if scores.shifted or scores.shift is not None:
            return replace(scores, shifted=True)
        return replace(scores, shift=extra if sign > 0 else self.emit(aten.neg.default, extra))

    def override(self, scores: Scores, condition: Any, value: Any, *, when: bool) -> Scores | None:
        """Scores replaced by `value` where `condition == when`."""
        if scores.inner is not None or scores.sinks is not None or self._depends(value):
            return None
        fixed = self.number(value)
        if self._depends(condition):
            parts = self.conditions.parts(condition, when) if fixed is not None and fixed <= HIDDEN else None
            if parts is None:
                return None
            scores = self.padded(scores, parts.keys)
            return scores if parts.places is None else self.override(scores, parts.places, value, when=True)
        if fixed is None or fixed > HIDDEN:
            where = condition if when else self.emit(aten.logical_not.default, condition)
            scores = replace(scores, replaced=(*scores.replaced, where))
        if isinstance(value, (int, float)):
            value = self.emit(aten.full.default, [], value, dtype=scores.q.meta["val"].dtype, device=self._device)
        kept = scores.mask
        if kept is None:
            kept = self.emit(aten.full.default, [], 0.0, dtype=value.meta["val"].dtype, device=self._device)
        pair = (value, kept) if when else (kept, value)
        return replace(scores, mask=self.emit(aten.where.self, condition, *pair))

    def padded(self, scores: Scores, keys: fx.Node | None) -> Scores:
        """Those keys are hidden as well."""
        return replace(scores, padding=self.conditions.either(scores.padding, keys))

    @property
    def conditions(self) -> Conditions:
        return Conditions(self.state, self.forms, self.emit)

    @property
    def _device(self) -> torch.device:
        return self.state.node(self.state.tokens).meta["val"].device

    def emit(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.state.call(op, args, kwargs, like=self.at)


def _rank(node: Any) -> int:
    return node.meta["val"].dim()


def _same_matrix(before: fx.Node, after: fx.Node) -> bool:
    return shape_of(before)[-2:] == shape_of(after)[-2:]


def _scaled(reader: Reader, node: fx.Node, factor: Callable[[float], float]) -> Scores | None:
    a, b = node.args[0], node.args[1]
    number = reader.number(b)
    if number is None and op_name(node) == "aten.mul" and reader.number(a) is not None:
        a, b, number = b, a, reader.number(a)
    if number is None and op_name(node) == "aten.mul":
        return _zeroed(reader, a, b) or _zeroed(reader, b, a)
    scores = reader.read(a)
    if scores is None or number is None or number == 0 or scores.sinks is not None:
        return None
    by = factor(number)
    if scores.inner is not None:  # c * tanh(inner * q k): a softcap of c
        return replace(scores, inner=None, softcap=by, scale=scores.inner * by)
    if scores.softcap or scores.key_bias is not None or (scores.padding is not None and by < 0):
        return None
    mask = None if scores.mask is None else reader.emit(aten.mul.Tensor, scores.mask, by)
    shift = None if scores.shift is None else reader.emit(aten.mul.Tensor, scores.shift, by)
    return _relative_scaled(reader, replace(scores, scale=scores.scale * by, mask=mask, shift=shift), by)


def _relative_scaled(reader: Reader, scores: Scores, by: float) -> Scores:
    term = scores.relative
    if term is None:
        return scores
    return replace(scores, relative=replace(term, queries=reader.emit(aten.mul.Tensor, term.queries, by)))


def _zeroed(reader: Reader, a: Any, b: Any) -> Scores | None:
    """scores * m for a mask m of zeros and ones: hidden scores become 0 (something below adds a large negative)."""
    form = reader.forms.of(b) if isinstance(b, fx.Node) and not reader._depends(b) else None
    if form is None or not reader._depends(a):
        return None
    if not form.is_bool and not zeros_and_ones(reader.forms, form):
        return None
    scores = reader.read(a)
    return None if scores is None else reader.override(scores, reader.emit(aten.eq.Scalar, b, 0), 0.0, when=True)


def _tanh(reader: Reader, node: fx.Node) -> Scores | None:
    scores = reader.read(node.args[0])
    if scores is None or scores.mask is not None or scores.softcap or scores.inner is not None or scores.shifted:
        return None
    if any(x is not None for x in (scores.key_bias, scores.shift, scores.padding, scores.relative)):
        return None
    return replace(scores, inner=scores.scale)


def _add(reader: Reader, node: fx.Node) -> Scores | None:
    a, b = node.args[0], node.args[1]
    if argument(node, "alpha") != 1:
        return None
    if reader._depends(a) and not reader._depends(b):
        scores, extra = reader.read(a), b
    elif reader._depends(b) and not reader._depends(a) and op_name(node) == "aten.add":
        scores, extra = reader.read(b), a
    elif isinstance(a, fx.Node) and isinstance(b, fx.Node):
        scores, extra = reader.read(a), b
        if scores is None:
            scores, extra = reader.read(b), a
    else:
        return None
    return None if scores is None else reader.add(scores, extra)


def _sub(reader: Reader, node: fx.Node) -> Scores | None:
    a, b = node.args[0], node.args[1]
    scores = reader.read(a)
    if scores is None:
        return None
    if _is_row_maximum(b, a):
        # With the sinks among them, scores and sinks are shifted alike.
        return scores if scores.sinks is not None else replace(scores, shifted=True)
    if reader.shifts(scores, b):
        return reader.shift(scores, b, -1)
    return None if argument(node, "alpha") != 1 else reader.add(scores, b, -1)


def _is_row_maximum(node: Any, of: Any) -> bool:
    """Whether a column of maxima, one a row: without keepdim it would stand under the columns."""
    if isinstance(node, fx.Node) and op_name(node) == "getitem":
        inner: Any = node.args[0]
        if op_name(inner) != "aten.max" or inner.args[0] is not of or node.args[1] != 0:
            return False
        return argument(inner, "dim") == -1 and bool(argument(inner, "keepdim"))
    if not isinstance(node, fx.Node) or op_name(node) != "aten.amax" or node.args[0] is not of:
        return False
    dims: Any = node.args[1]
    return list(dims) == [-1] and bool(argument(node, "keepdim"))


def _where(reader: Reader, node: fx.Node) -> Scores | None:
    if node.target is aten.where.default:
        return None
    condition, yes, no = node.args
    if reader._depends(yes):
        scores = reader.read(yes)
        return None if scores is None else reader.override(scores, condition, no, when=False)
    scores = reader.read(no)
    return None if scores is None else reader.override(scores, condition, yes, when=True)


def _masked_fill(reader: Reader, node: fx.Node) -> Scores | None:
    scores = reader.read(node.args[0])
    return None if scores is None else reader.override(scores, node.args[1], node.args[2], when=True)


def _cast(reader: Reader, node: fx.Node) -> Scores | None:
    before: Any = node.args[0]
    if not node.meta["val"].dtype.is_floating_point:
        return None
    scores = reader.read(before)
    return scores if scores is not None and reader.keeps(scores.q, node) else None


def _rounds(operand: fx.Node, node: fx.Node) -> bool:
    """Whether `node` holds less of a number than the queries do: what rounds scores there is not left out."""
    finest, here = (torch.finfo(n.meta["val"].dtype) for n in (operand, node))
    return here.eps > finest.eps or here.max < finest.max


def _reshape(reader: Reader, node: fx.Node) -> Scores | None:
    """[1, H, T, T] <-> [H, T, T]: heads keep their order, so masks must broadcast the same way on both sides."""
    before: Any = node.args[0]
    a, b = [s for s in shape_of(before) if s != 1], [s for s in shape_of(node) if s != 1]
    if a != b or not _same_matrix(before, node):
        return None
    scores = reader.read(before)
    if scores is None or scores.mask is None or len(shape_of(scores.mask)) <= _rank(node):
        return scores  # broadcasting is from the right, so [H, q, k] serves for [1, H, q, k]
    if shape_of(scores.mask)[0] != 1 or len(shape_of(scores.mask)) != _rank(node) + 1:
        return None
    return replace(scores, mask=reader.emit(aten.squeeze.dim, scores.mask, 0))


def _baddbmm(reader: Reader, node: fx.Node) -> Scores | None:
    extra, a, b = node.args[:3]
    alpha, beta = argument(node, "alpha"), argument(node, "beta")
    if not (reader._depends(a) and reader._depends(b)):
        return None
    if not isinstance(alpha, (int, float)) or not isinstance(beta, (int, float)):
        return None
    scores = Scores(a, b, scale=float(alpha))
    if beta == 0:
        return scores
    added = extra if beta == 1 else reader.emit(aten.mul.Tensor, extra, beta)
    return reader.add(scores, added)


def _floor(reader: Reader, node: fx.Node) -> Scores | None:
    """maximum(scores, lowest float): the mask's own values, kept from running over."""
    lowest = argument(node, "other", argument(node, "min"))
    bound = reader.number(lowest) if argument(node, "max") is None else None
    return reader.read(node.args[0]) if bound is not None and bound <= _LOWEST else None


def _finite(reader: Reader, node: fx.Node) -> Scores | None:
    """nan_to_num: a product of finite numbers is a number, and what was minus infinity hides as the lowest float."""
    lowest = argument(node, "neginf")
    return reader.read(node.args[0]) if lowest is None or lowest <= _LOWEST else None


def _cat(reader: Reader, node: fx.Node) -> Scores | None:
    """[scores, sink]: one more column, the same for every query."""
    parts: Any = node.args[0]
    dim: Any = node.args[1]
    if len(parts) != 2 or dim not in (-1, _rank(node) - 1) or reader._depends(parts[1]) or shape_of(parts[1])[-1] != 1:
        return None
    scores = reader.read(parts[0])
    if scores is None or scores.sinks is not None or scores.inner is not None or scores.shifted:
        return None
    return replace(scores, sinks=parts[1])


_RULES: dict[str, Callable[[Reader, fx.Node], Scores | None]] = {
    "aten.mul": lambda reader, node: _scaled(reader, node, lambda x: x),
    "aten.div": lambda reader, node: _scaled(reader, node, lambda x: 1.0 / x),
    "aten.tanh": _tanh,
    "aten.add": _add,
    "aten.sub": _sub,
    "aten.where": _where,
    "aten.masked_fill": _masked_fill,
    "aten._to_copy": _cast,
    "aten.reshape": _reshape,
    "aten.baddbmm": _baddbmm,
    "aten.maximum": _floor,
    "aten.max": _floor,
    "aten.clamp_min": _floor,
    "aten.clamp": _floor,
    "aten.nan_to_num": _finite,
    "aten.cat": _cat,
}
