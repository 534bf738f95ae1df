"""A bias computed from the keys' tokens or positions, the same for every query: one more dimension of K.

b[h, j] added to the scores of key j is q' k' with q' = [q, 1 / scale] and k' = [k, b], so that it is written to the
cache with the key; query heads that share a key head and differ in b get a dimension each. Here it is only taken apart
from the mask; that b[h, j] depends on token j alone is proved by token locality, which sees it as a part of K.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from treespec_compiler.errors import Refusal
from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import ClosedForms, axis, shape_of
from ..forms.masks import BURIED, HIDDEN
from ..framework.state import GraphState, refuse
from .padding import Conditions

aten = torch.ops.aten

# In an attention's metadata: whether a bias that is computed from the keys' tokens is a part of its scores.
BIASED = "key_bias"


@dataclass(frozen=True)
class SplitMask:
    """mask + bias: a mask that does not depend on content (or None), and a bias [.., heads, 1, T]; keys where `padding`
    [.., 1, T] holds are hidden by their token."""

    mask: fx.Node | None
    bias: fx.Node | None
    padding: fx.Node | None = None


class Splitter:
    """Takes an additive mask apart; `repeated` finds the source of a repetition of heads."""

    def __init__(
        self, state: GraphState, forms: ClosedForms, at: fx.Node, repeated: Callable[[fx.Node], fx.Node | None]
    ) -> None:
        self.state, self.forms, self.at, self.repeated = state, forms, at, repeated
        self.conditions = Conditions(state, forms, self.emit)

    def split(self, node: Any) -> SplitMask | None:
        """The parts of a mask [.., H, T, T] that depends on token content, or None where it is not of this form."""
        if not self._depends(node) or not node.meta["val"].is_floating_point():
            return None
        source = self.repeated(node)
        if source is not None:
            found = self.split(source)
            return found if found is not None and _one_head(found.mask) else None
        if self._a_row(node):
            if _hides(node, self.forms):
                return self._hidden(node)
            return SplitMask(None, node if len(shape_of(node)) > 1 else self.emit(aten.unsqueeze.default, node, 0))
        rule = _RULES.get(op_name(node))
        found = rule(self, node) if rule is not None else None
        return self._hidden(node) if found is None else found

    def seen(self, node: fx.Node) -> SplitMask | None:
        """The parts of a condition on token content that shows keys."""
        parts = self.conditions.parts(node, holds=False) if self._depends(node) else None
        if parts is None or parts.keys is None:
            return None
        mask = None if parts.places is None else self.emit(aten.logical_not.default, parts.places)
        return SplitMask(mask, None, parts.keys)

    def _hidden(self, node: fx.Node) -> SplitMask | None:
        """Of zeros, and numbers that hide keys."""
        parts = self.conditions.hiding(node)
        if parts is None or parts.keys is None:
            return None
        found = SplitMask(None, None, parts.keys)
        return found if parts.places is None else self._hide(found, parts.places, -math.inf, when=True)

    def _a_row(self, node: fx.Node) -> bool:
        shape = shape_of(node)
        return bool(shape) and shape[-1] == self.state.length and shape[-2:-1] in ((), (1,))

    def _depends(self, node: Any) -> bool:
        """On token content, on positions in a way that no formula shows (ALiBi rounded to bfloat16), or on a table of
        numbers that is read at the key's place."""
        if not isinstance(node, fx.Node):
            return False
        return node in self.forms.tainted or self.forms.of(node) is None or self._by_place(node)

    def _by_place(self, node: fx.Node) -> bool:
        form = self.forms.of(node)
        if form is None or form.is_bool or not form.shape or not node.meta["val"].is_floating_point():
            return False
        key = axis(len(form.shape) - 1)
        reads = [read for read in form.tables if key in read.free_symbols]
        return bool(reads) and all(
            read.free_symbols <= {key} and bool((self.forms.values(str(read.func)) > HIDDEN).all()) for read in reads
        )

    def _buried(self, value: Any) -> bool:
        """Whether a value hides a key whatever is added to it."""
        if isinstance(value, (int, float)):
            return value <= BURIED
        form = self.forms.of(value) if isinstance(value, fx.Node) and not self._depends(value) else None
        return form is not None and bool(form.expr.is_number) and not form.is_bool and bool(form.expr <= BURIED)

    def base(self, node: Any) -> SplitMask | None:
        """The parts of any additive mask, one of places alone too."""
        if not isinstance(node, fx.Node) or not node.meta["val"].is_floating_point():
            return None
        return self.split(node) if self._depends(node) else SplitMask(node, None)

    def hide(self, inner: SplitMask | None, condition: Any, value: Any, *, when: bool) -> SplitMask | None:
        """The mask hides a key where `condition == when`."""
        if inner is None or not (self._buried(value) if inner.bias is not None else self._hides(value)):
            return None
        if self._depends(condition):
            parts = self.conditions.parts(condition, when)
            if parts is None:
                return None
            inner = replace(inner, padding=self.conditions.either(inner.padding, parts.keys))
            return inner if parts.places is None else self._hide(inner, parts.places, value, when=True)
        return self._hide(inner, condition, value, when=when)

    def _hides(self, value: Any) -> bool:
        if isinstance(value, (int, float)):
            return value <= HIDDEN
        form = self.forms.of(value) if isinstance(value, fx.Node) and not self._depends(value) else None
        return form is not None and bool(form.expr.is_number) and not form.is_bool and bool(form.expr <= HIDDEN)

    def _hide(self, inner: SplitMask, condition: fx.Node, value: Any, *, when: bool) -> SplitMask:
        known = inner.mask if inner.bias is None else inner.bias
        like = self.at.meta["val"] if known is None or not known.meta["val"].is_floating_point() else known.meta["val"]
        if isinstance(value, (int, float)):
            value = self.emit(aten.full.default, [], value, dtype=like.dtype, device=like.device)
        kept = inner.mask
        if kept is None:
            kept = self.emit(aten.full.default, [], 0.0, dtype=like.dtype, device=like.device)
        pair = (value, kept) if when else (kept, value)
        return replace(inner, mask=self.emit(aten.where.self, condition, *pair))

    def emit(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.state.call(op, args, kwargs, like=self.at)


def _one_head(mask: fx.Node | None) -> bool:
    return mask is None or len(shape_of(mask)) < 3 or all(s == 1 for s in shape_of(mask)[:-2])


def _hides(node: Any, forms: ClosedForms) -> bool:
    """Whether the row is put together with a value that hides keys: a mask of token content, not a bias."""
    stack = [node]
    while stack:
        current = stack.pop()
        if isinstance(current, (int, float)):
            if abs(current) >= -HIDDEN:
                return True
        elif isinstance(current, fx.Node) and op_name(current) in _SHAPED:
            stack.append(current.args[0])
        elif isinstance(current, fx.Node) and op_name(current) in _COMBINED:
            stack.extend(current.args)
        elif isinstance(current, fx.Node) and current not in forms.tainted:
            form = forms.of(current)
            if form is not None and not form.is_bool and form.expr.is_number and abs(form.expr) >= -HIDDEN:
                return True
    return False


_SHAPED = (
    "aten.unsqueeze", "aten.squeeze", "aten.reshape", "aten.transpose", "aten.permute", "aten.expand", "aten._to_copy",
    "aten.slice", "aten.select",
)  # fmt: skip
_COMBINED = (
    "aten.where", "aten.masked_fill", "aten.mul", "aten.add", "aten.sub", "aten.rsub", "aten.neg", "aten.div",
    "aten.maximum", "aten.minimum", "aten.clamp",
)  # fmt: skip


def _expand(splitter: Splitter, node: fx.Node) -> SplitMask | None:
    source: Any = node.args[0]
    return splitter.split(source) if shape_of(source)[-1] == shape_of(node)[-1] else None


def _masked_fill(splitter: Splitter, node: fx.Node) -> SplitMask | None:
    return splitter.hide(splitter.base(node.args[0]), node.args[1], node.args[2], when=True)


def _where(splitter: Splitter, node: fx.Node) -> SplitMask | None:
    if node.target is aten.where.default:
        return None
    condition, yes, no = node.args
    if splitter._depends(yes) or splitter._hides(no):
        return splitter.hide(splitter.base(yes), condition, no, when=False)
    return splitter.hide(splitter.base(no), condition, yes, when=True)


def _add(splitter: Splitter, node: fx.Node) -> SplitMask | None:
    a, b = node.args[:2]
    if argument(node, "alpha") != 1 or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    first, second = splitter.base(a), splitter.base(b)
    if first is None or second is None or (first.bias is not None and second.bias is not None):
        return None
    both = second.mask if first.mask is None else first.mask
    if first.mask is not None and second.mask is not None:
        both = splitter.emit(aten.add.Tensor, first.mask, second.mask)
    keys = splitter.conditions.either(first.padding, second.padding)
    return SplitMask(both, second.bias if first.bias is None else first.bias, keys)


def _cast(splitter: Splitter, node: fx.Node) -> SplitMask | None:
    return splitter.split(node.args[0])


def _reshape(splitter: Splitter, node: fx.Node) -> SplitMask | None:
    """[H, T, T] <-> [1, H, T, T]: dimensions of one in front, which a mask may do without."""
    before: Any = node.args[0]
    a, b = (list(shape_of(n)) for n in (before, node))
    same = a[-2:] == b[-2:] and [s for s in a if s != 1] == [s for s in b if s != 1]
    found = splitter.split(before) if same else None
    if found is None or found.bias is not None:
        return None
    mask = found.mask
    while mask is not None and len(shape_of(mask)) > len(b):
        if shape_of(mask)[0] != 1:
            return None
        mask = splitter.emit(aten.squeeze.dim, mask, 0)
    return replace(found, mask=mask)


_RULES: dict[str, Callable[[Splitter, fx.Node], SplitMask | None]] = {
    "aten.expand": _expand,
    "aten.masked_fill": _masked_fill,
    "aten.where": _where,
    "aten.add": _add,
    "aten._to_copy": _cast,
    "aten.reshape": _reshape,
    "aten.unsqueeze": _reshape,
}


def with_key_bias(
    state: GraphState, at: fx.Node, q: fx.Node, k: fx.Node, bias: fx.Node, scale: float
) -> tuple[fx.Node, fx.Node]:
    """[q, 1 / scale] and [k, bias] for q [1, Hq, T, D], k [1, Hkv, T, D] and a bias [.., heads, 1, T]."""
    column = state.call(aten.transpose.int, (bias, -2, -1), like=at)
    while len(shape_of(column)) < 4:
        column = state.call(aten.unsqueeze.default, (column, 0), like=at)
    heads, kv_heads, query_heads = shape_of(column)[1], shape_of(k)[1], shape_of(q)[1]
    if shape_of(column)[0] != 1 or (kv_heads % heads != 0 and heads != query_heads):
        raise refuse(Refusal.MASK, f"a bias by key token has {heads} heads, and the keys {kv_heads}", at)
    dtype = k.meta["val"].dtype
    if column.meta["val"].dtype != dtype:
        column = state.call(aten._to_copy.default, (column,), {"dtype": dtype}, like=at)
    if kv_heads % heads == 0:
        share = 1
        if kv_heads != heads:
            column = state.call(aten.repeat_interleave.self_int, (column, int(kv_heads / heads), 1), like=at)
    else:
        share = int(heads / kv_heads)
        column = _by_key_head(state, at, column, int(kv_heads), share)
    parts = _parts(1.0 / scale, dtype)
    one = state.call(aten.slice.Tensor, (q, -1, 0, 1), like=at)
    ones = [state.call(aten.full_like.default, (one, part), like=at) for part in parts]
    if share > 1:
        own = _own_column(state, at, q, int(kv_heads), share)
        ones = [state.call(aten.mul.Tensor, (part, own), like=at) for part in ones]
    q = state.call(aten.cat.default, ([q, *ones], -1), like=at)
    return q, state.call(aten.cat.default, ([k] + [column] * len(parts), -1), like=at)


def with_row_shift(
    state: GraphState, at: fx.Node, q: fx.Node, k: fx.Node, shift: fx.Node, scale: float
) -> tuple[fx.Node, fx.Node]:
    """[q, shift / scale] and [k, 1] for q [1, Hq, T, D], k [1, Hkv, T, D] and what is added to each row, [.., T, 1]."""
    while len(shape_of(shift)) < 4:
        shift = state.call(aten.unsqueeze.default, (shift, 0), like=at)
    column = state.call(aten.mul.Tensor, (shift, 1.0 / scale), like=at)
    if column.meta["val"].dtype != q.meta["val"].dtype:
        column = state.call(aten._to_copy.default, (column,), {"dtype": q.meta["val"].dtype}, like=at)
    column = state.call(aten.expand.default, (column, [1, int(shape_of(q)[1]), -1, 1]), like=at)
    one = state.call(aten.ones_like.default, (state.call(aten.slice.Tensor, (k, -1, 0, 1), like=at),), like=at)
    q = state.call(aten.cat.default, ([q, column], -1), like=at)
    return q, state.call(aten.cat.default, ([k, one], -1), like=at)


def _by_key_head(state: GraphState, at: fx.Node, column: fx.Node, kv_heads: int, share: int) -> fx.Node:
    """[1, Hq, T, 1] -> [1, Hkv, T, Hq / Hkv]: the biases of the query heads that share a key head, side by side."""
    split = state.call(aten.reshape.default, (column, [kv_heads, share, tokens_of(state, at), 1]), like=at)
    side = state.call(aten.permute.default, (split, [3, 0, 2, 1]), like=at)
    return side


def tokens_of(state: GraphState, at: fx.Node) -> fx.Node:
    """The number of tokens, as a size."""
    return state.call(aten.sym_size.int, (state.node(state.tokens), 1), like=at)


def _own_column(state: GraphState, at: fx.Node, q: fx.Node, kv_heads: int, share: int) -> fx.Node:
    """[1, Hq, 1, Hq / Hkv] of zeros, and a one where a query head finds its own bias."""
    value = q.meta["val"]
    kind = {"dtype": value.dtype, "device": value.device}
    eye = state.call(aten.eye.default, (share,), kind, like=at)
    tiled = state.call(aten.repeat.default, (eye, [kv_heads, 1]), like=at)
    return state.call(aten.reshape.default, (tiled, [1, kv_heads * share, 1, share]), like=at)


def _parts(value: float, dtype: torch.dtype) -> list[float]:
    """Numbers of `dtype` that add up to `value`: two where one is no better than the dtype's rounding of 16 bits."""
    first = float(torch.tensor(value, dtype=torch.float64).to(dtype))
    rest = float(torch.tensor(value - first, dtype=torch.float64).to(dtype))
    close = math.isclose(first, value, rel_tol=1e-6)
    return [first] if close else [first, rest]
