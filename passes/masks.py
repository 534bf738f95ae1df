"""Deciding what a mask is, from its closed form.

For a mask that depends on d = q - k only, every atom of the closed form is a linear inequality in d, so the mask is
constant between consecutive breakpoints: evaluating it on each side of every breakpoint decides it for all q and k.
A mask read from a buffer is decided on every element of the buffer, and holds up to the buffer's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from torch import Tensor

from treespec_compiler.ir.specs import MaskSpec

from .closed_form import Form, axis

# An additive mask value at or below this hides a key: exp(-1e4) is 0 in float32, and models use -1e4 and lower.
HIDDEN = -1e4

_DISTANCE = sympy.Symbol("d", integer=True)


class NotAMask(Exception):
    """The closed form is no causal or windowed mask; the text says what it is instead."""


@dataclass(frozen=True)
class _Visible:
    """Visible distances q - k: `low <= q - k <= high` (None: unbounded)."""

    low: int | None
    high: int | None


def classify(form: Form, length: sympy.Symbol, evaluate: Callable[[int], Tensor], sizes: dict[str, Tensor]) -> MaskSpec:
    """The MaskSpec of a [.., q, k] mask.

    `evaluate(n)` runs the mask's own subgraph for n tokens; `sizes` maps table names to their tensors.
    Raises NotAMask.
    """
    rank = len(form.shape)
    q, k = axis(rank - 2), axis(rank - 1)
    extra = form.expr.free_symbols - {q, k}
    if length in extra:
        raise NotAMask(f"the mask depends on the total number of tokens: {_text(form, q, k)}")
    if extra:
        raise NotAMask(f"the mask differs between heads or batch entries: {_text(form, q, k)}")
    if form.tables:
        return _from_table(form, evaluate, sizes, q, k)
    spec = _spec(_visible_distances(form, q, k), None, _text(form, q, k))
    _cross_check(spec, form, evaluate)
    return spec


def _text(form: Form, q: sympy.Symbol, k: sympy.Symbol) -> str:
    return str(form.expr.xreplace({q: sympy.Symbol("q"), k: sympy.Symbol("k")}))


def _visible_distances(form: Form, q: sympy.Symbol, k: sympy.Symbol) -> _Visible:
    text = _text(form, q, k)
    expr = form.expr.xreplace({q: k + _DISTANCE})
    replaced: dict[Any, Any] = {}
    breakpoints: set[int] = {0}
    for atom in expr.atoms(Relational):
        gap = sympy.expand(atom.lhs - atom.rhs)
        if gap.free_symbols - {_DISTANCE} or not gap.is_polynomial(_DISTANCE) or sympy.degree(gap, _DISTANCE) > 1:
            raise NotAMask(f"the mask is not a function of the distance q - k: {text}")
        replaced[atom] = atom.func(gap, 0)
        if gap.free_symbols:
            at = -gap.coeff(_DISTANCE, 0) / gap.coeff(_DISTANCE, 1)
            breakpoints |= {math.floor(at), math.ceil(at)}
    expr = expr.xreplace(replaced)
    if expr.free_symbols - {_DISTANCE}:
        raise NotAMask(f"the mask is not a function of the distance q - k: {text}")
    decided = {a: sympy.Symbol(f"c{i}") for i, a in enumerate(expr.atoms(Relational))}
    if _DISTANCE in expr.xreplace(decided).free_symbols:
        raise NotAMask(f"attention scores get a bias that varies with the distance: {text}")
    points = sorted({p + e for p in breakpoints for e in (-1, 0, 1)})
    seen = {p: _is_visible(expr.xreplace({_DISTANCE: sympy.Integer(p)}), text) for p in points}
    shown = [p for p in points if seen[p]]
    if not shown:
        raise NotAMask(f"the mask hides everything: {text}")
    low, high = shown[0], shown[-1]
    if any(not seen[p] for p in points if low <= p <= high):
        raise NotAMask(f"the visible distances have a gap: {text}")
    return _Visible(None if low == points[0] else low, None if high == points[-1] else high)


def _is_visible(value: Any, text: str) -> bool:
    if value in (sympy.true, sympy.false):
        return bool(value)
    if value == 0:
        return True
    if value == -sympy.oo or (value.is_number and value is not sympy.nan and value <= HIDDEN):
        return False
    raise NotAMask(f"attention scores get a bias of {value}: {text}")


def _spec(seen: _Visible, limit: int | None, text: str) -> MaskSpec:
    if seen.low is None or seen.low < 0:
        reach = "every later token" if seen.low is None else f"{-seen.low} later token(s)"
        raise NotAMask(f"a query sees {reach}, so this is not a causal decoder: {text}")
    if seen.low > 0:
        raise NotAMask(
            f"a query does not see the last {seen.low} token(s), itself included (an off-by-one mask?): {text}"
        )
    return MaskSpec(window=0 if seen.high is None else seen.high + 1, limit=limit)


def _from_table(form: Form, evaluate: Callable[[int], Tensor], sizes: dict[str, Tensor], q: Any, k: Any) -> MaskSpec:
    text = _text(form, q, k)
    limit = _table_limit(form, sizes, q, k, text)
    visible = visible_matrix(evaluate(limit), text)
    index = torch.arange(limit)
    distance = index[:, None] - index[None, :]
    by_distance = torch.zeros(2 * limit - 1, dtype=torch.bool)
    by_distance[:limit] = visible[0].flip(0)  # distances -(limit-1) .. 0
    by_distance[limit - 1 :] = visible[:, 0]  # distances 0 .. limit-1
    if not torch.equal(by_distance[distance + limit - 1], visible):
        raise NotAMask(f"the mask buffer is not a function of the distance q - k: {text}")
    shown = by_distance.nonzero().flatten() - (limit - 1)
    if not len(shown):
        raise NotAMask(f"the mask hides everything: {text}")
    low, high = int(shown[0]), int(shown[-1])
    if high - low + 1 != len(shown):
        raise NotAMask(f"the visible distances have a gap: {text}")
    at_start, at_end = low == -(limit - 1), high == limit - 1
    return _spec(_Visible(None if at_start and limit > 1 else low, None if at_end else high), limit, text)


def _table_limit(form: Form, sizes: dict[str, Tensor], q: Any, k: Any, text: str) -> int:
    """The largest context for which every table read by the mask is inside its table."""
    limits = []
    for read in form.tables:
        tensor = sizes[str(read.func)]
        for size, index in zip(tensor.shape, read.args, strict=True):
            for symbol in index.free_symbols & {q, k}:
                offset = sympy.expand(index - symbol)
                if not offset.is_Integer or offset < 0:
                    raise NotAMask(f"the mask reads a buffer at {index}: {text}")
                limits.append(int(size) - int(offset))
    if not limits or min(limits) < 2:
        raise NotAMask(f"the mask reads a buffer that does not depend on q and k: {text}")
    return min(limits)


def visible_matrix(mask: Tensor, text: str) -> Tensor:
    """Boolean [n, n] of an evaluated mask [.., n, n] (or broadcast over q or k) that no other dimension changes."""
    values = mask if mask.dtype is torch.bool else None
    if values is None:
        hidden, shown = mask <= HIDDEN, mask == 0
        if not bool((hidden | shown).all()):
            raise NotAMask(f"attention scores get a bias: {text}")
        values = shown
    n = max(values.shape[-2:])
    flat = values.expand(*values.shape[:-2], n, n).reshape(-1, n, n)
    if not bool((flat == flat[:1]).all()):
        raise NotAMask(f"the mask differs between heads or batch entries: {text}")
    return flat[0]


# Sizes up to this are evaluated in the cross-check: an n x n mask of 2048 takes 4 MB.
_LARGEST_CHECK = 2048


def _cross_check(spec: MaskSpec, form: Form, evaluate: Callable[[int], Tensor]) -> None:
    """Run the mask itself for more tokens than any integer in it, and compare with the predicate."""
    literals = [int(abs(x)) for x in form.expr.atoms(sympy.Integer) if abs(x) < _LARGEST_CHECK - 8]
    n = max([8, *literals]) + 5
    index = torch.arange(n)
    expected = spec.visible(index[:, None], index[None, :])
    if not torch.equal(visible_matrix(evaluate(n), str(form.expr)).cpu(), expected):
        raise NotAMask(f"the mask's closed form {form.expr} disagrees with its values for {n} tokens")
