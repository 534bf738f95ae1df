"""Deciding what a mask is, from its closed form.

For a mask that depends on d = q - k only, every atom of the closed form is a linear inequality in d, so the mask is
constant between consecutive breakpoints: evaluating it on each side of every breakpoint decides it for all q and k.
A mask read from a buffer is decided on every element of the buffer, and holds up to the buffer's size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from torch import Tensor

from treespec_compiler.ir.specs import MaskSpec

from .biases import LONGEST_BIAS, NotAMask, bias_kind, longest_rows
from .closed_form import Form, axis
from .own_keys import hides_itself, own_far_below
from .patterns import HIDDEN as HIDDEN
from .patterns import chunk_of_values, pattern_of_form, pattern_of_values, whole_prefix
from .turning_point import root

BIDIRECTIONAL = "bidirectional attention: every query sees every key, so this is not a causal decoder"
# A hiding value that a bias is added to (ALiBi on top of the lowest float) is at or below this.
BURIED = -1e9

# How far apart numbers of one distance may be in a buffer, relative to 1 or themselves (`score_check` compares again).
_CLOSE = 1e-5

_DISTANCE = sympy.Symbol("d", integer=True)


@dataclass(frozen=True)
class _Visible:
    """Visible distances q - k: `low <= q - k <= high` (None: unbounded)."""

    low: int | None
    high: int | None


@dataclass(frozen=True)
class Scoring:
    """A mask, and what it adds to the scores of visible keys: "" (nothing), "slopes" (slope_h * (k - q), up to a
    constant a row, which softmax does not see), "distance" (a value per head and distance, up to `mask.limit`) or
    "places" (a value per head, query and key, up to it)."""

    mask: MaskSpec
    bias: str = ""
    text: str = ""
    """The closed form that it was read from by algebra; to be compared with the values (`score_check`)."""


def classify(
    form: Form,
    length: sympy.Symbol,
    evaluate: Callable[[int], Tensor],
    sizes: dict[str, Tensor],
    sinks: bool = False,
) -> Scoring:
    """What a [.., heads, q, k] mask does.

    `evaluate(n)` runs the mask's own subgraph for n tokens; `sizes` maps table names to their tensors; `sinks`: what is
    constant along a row counts, since a sink stands beside the scores.
    Raises NotAMask.
    """
    try:
        return _classified(form, length, evaluate, sizes, sinks)
    except NotAMask:
        q, k = _query_and_key(form)
        text = _text(form, q, k)
        if _is_table(form, q, k):
            limit = _table_limit(form, sizes, q, k, text)
            visible = visible_matrix(evaluate(limit), text)
            chunk = chunk_of_values(visible)
            if chunk is not None:
                return Scoring(MaskSpec(limit=limit, chunk=chunk), text=text)
            found = pattern_of_values(visible)
        else:
            limit, found = None, pattern_of_form(form.expr, q, k)
        if found is None and whole_prefix(form.expr, q, k):
            raise NotAMask(
                "the first queries see later tokens, as in a prefix that is seen as a whole: its rows change while it "
                f"grows, so the model is causal only behind it: {text}"
            ) from None
        if found is None:
            raise
        return Scoring(MaskSpec(limit=limit, pattern=found), text=text)


def _classified(
    form: Form, length: sympy.Symbol, evaluate: Callable[[int], Tensor], sizes: dict[str, Tensor], sinks: bool
) -> Scoring:
    q, k = _query_and_key(form)
    if _is_table(form, q, k):
        biased = _biased_table(form, evaluate, sizes, q, k)
        if biased is not None:
            return biased
        extra = form.expr.free_symbols - {q, k}
        if extra:
            raise NotAMask(f"the mask differs between heads, or depends on the number of tokens: {_text(form, q, k)}")
        return Scoring(_from_table(form, evaluate, sizes, q, k), text=_text(form, q, k))
    return _analytic(form, length, evaluate, sizes, q, k, sinks)


def hides_all(form: Form, evaluate: Callable[[int], Tensor], sizes: dict[str, Tensor]) -> bool:
    """Whether a [.., heads, q, k] mask is proved to hide every key from every query."""
    q, k = _query_and_key(form)
    text = _text(form, q, k)
    try:
        if _is_table(form, q, k):
            return bool((evaluate(_table_limit(form, sizes, q, k, text)) <= HIDDEN).all())
        return all(_is_hidden(value) for value in _cells(form.expr, q, k, text).values())
    except NotAMask:
        return False


def _query_and_key(form: Form) -> tuple[sympy.Symbol, sympy.Symbol]:
    rank = len(form.shape)
    return axis(rank - 2), axis(rank - 1)


def _is_table(form: Form, q: sympy.Symbol, k: sympy.Symbol) -> bool:
    """Whether the values of a buffer decide what is seen."""
    compared = any(read.args for atom in form.expr.atoms(Relational) for read in atom.atoms(AppliedUndef))
    return compared or _pair_tables(form, q, k)


def _pair_tables(form: Form, q: sympy.Symbol, k: sympy.Symbol) -> bool:
    """Whether a table is read at [.., q, .., k]: a mask buffer."""
    return any(
        {q, k} <= read.free_symbols and not any({q, k} <= a.free_symbols for a in read.args) for read in form.tables
    )


def _analytic(
    form: Form,
    length: sympy.Symbol,
    evaluate: Callable[[int], Tensor],
    sizes: dict[str, Tensor],
    q: Any,
    k: Any,
    sinks: bool,
) -> Scoring:
    text = _text(form, q, k)
    expr, chunk = _without_chunks(form.expr, q, k, text)
    cells = _cells(expr, q, k, text)
    if any(map(_undecided, cells.values())):
        cells = _cells(expr, q, k, text, every=True)
    hidden = {p for p, value in cells.items() if _is_hidden(value)}
    if not chunk and hides_itself(cells, hidden):
        return Scoring(MaskSpec(limit=LONGEST_BIAS), "distance", text)
    shown = {value for p, value in cells.items() if p not in hidden}
    if len(shown) > 1:
        raise NotAMask(f"the scores change differently at different distances: {text}")
    seen = _visible_distances(sorted(cells), hidden, text)
    bias, limit = ("", None) if not shown else bias_kind(shown.pop(), _DISTANCE, q, k, length, sizes, text, sinks)
    spec = replace(_spec(seen, limit, text), chunk=chunk)
    if bias == "slopes" and 1 in (spec.window, chunk):
        bias = ""  # at distance 0 it is 0, and no other one is seen that could tell the slope
    if chunk and spec.window >= chunk:
        spec = replace(spec, window=0)
    return Scoring(spec, bias, text)


def _without_chunks(expr: Any, q: Any, k: Any, text: str) -> tuple[Any, int]:
    """The expression inside one chunk, and the chunk's size (0: no chunks)."""
    chunk = 0
    for size in sorted(_chunk_sizes(expr, q, k)):
        pair = (sympy.floor(q / size), sympy.floor(k / size))
        same = [sympy.Eq(*pair), sympy.Eq(*pair[::-1])]
        other = [sympy.Ne(*pair), sympy.Ne(*pair[::-1])]
        inside = dict.fromkeys(same, sympy.true) | dict.fromkeys(other, sympy.false)
        outside = dict.fromkeys(same, sympy.false) | dict.fromkeys(other, sympy.true)
        if chunk or not all(_is_hidden(v) for v in _cells(expr.xreplace(outside), q, k, text).values()):
            raise NotAMask(f"chunks combined in another way than `and`: {text}")
        chunk, expr = size, expr.xreplace(inside)
    return expr, chunk


def _chunk_sizes(expr: Any, q: Any, k: Any) -> set[int]:
    """Every n for which floor(q / n) and floor(k / n) are compared for being equal."""
    found = set()
    for atom in expr.atoms(sympy.Eq, sympy.Ne):
        parts = {c for f in atom.atoms(sympy.floor) for c in f.atoms(sympy.Rational) if c != 0 and c.p == 1}
        found |= {int(1 / c) for c in parts if {atom.lhs, atom.rhs} == {sympy.floor(q * c), sympy.floor(k * c)}}
    return found


def _text(form: Form, q: sympy.Symbol, k: sympy.Symbol) -> str:
    return str(form.expr.xreplace({q: sympy.Symbol("q"), k: sympy.Symbol("k")}))


def _undecided(value: Any) -> bool:
    """Whether conditions on the distance that are not linear in it say what is hidden."""
    if isinstance(value, sympy.logic.boolalg.Boolean):
        return value not in (sympy.true, sympy.false)
    pieces = [v for p in value.atoms(sympy.Piecewise) for v, _ in p.args]
    return any(v.has(-sympy.oo) or (v.is_number and bool(v <= HIDDEN)) for v in pieces)


def _cells(expr: Any, q: sympy.Symbol, k: sympy.Symbol, text: str, every: bool = False) -> dict[int, Any]:
    """The expression's value around every breakpoint, with each condition on the distance decided.

    `every`: conditions that are not linear in the distance too, at every distance up to the numbers in them.
    """
    expr = expr.xreplace({q: k + _DISTANCE})
    atoms: dict[Any, Any] = {}
    breakpoints: set[int] = {0}
    for atom in expr.atoms(Relational):
        gap = sympy.expand(atom.lhs - atom.rhs)
        if gap.free_symbols == {_DISTANCE} and not (gap.is_polynomial(_DISTANCE) and sympy.degree(gap, _DISTANCE) < 2):
            if every:
                atoms[atom] = atom.func(gap, 0)
                breakpoints |= _small(gap)
            continue  # else it stays undecided: fine in a bias, refused in a mask
        if gap.free_symbols - {_DISTANCE} or not gap.is_polynomial(_DISTANCE) or sympy.degree(gap, _DISTANCE) > 1:
            raise NotAMask(f"the mask is not a function of the distance q - k: {text}")
        # NOTE the cross-check runs for few tokens; q * 0.1 - k * 0.1 < 0.3 rounds differently for other q and k. Halves
        # are exact, and are what sympy makes of 2 * q - 2 * k < 1.
        if any(c.q > 2 if c.is_Rational else True for c in sympy.Poly(gap, _DISTANCE).coeffs()):
            raise NotAMask(f"the mask compares fractions, which floating point rounds: {text}")
        atoms[atom] = atom.func(gap, 0)
        if gap.free_symbols:
            at = root(gap, _DISTANCE)
            breakpoints |= {int(sympy.floor(at)), int(sympy.ceiling(at))}
    points = sorted({p + e for p in breakpoints for e in (-1, 0, 1)})
    here = {p: {a: sympy.sympify(g).xreplace({_DISTANCE: sympy.Integer(p)}) for a, g in atoms.items()} for p in points}
    return {p: _decided(expr.xreplace(here[p])) for p in points}


def _small(gap: Any) -> set[int]:
    """Every distance up to the largest number in a condition; what comes after is compared by value."""
    reach = max([int(abs(x.p)) for x in gap.atoms(sympy.Rational)], default=0)
    return set(range(-min(reach, _FARTHEST) - 8, min(reach, _FARTHEST) + 9))


# Distances that are looked at one by one where a condition is not linear.
_FARTHEST = 256


def _decided(value: Any) -> Any:
    """Booleans as scores: a visible key adds nothing, a hidden one minus infinity."""
    if value.has(sympy.zoo):
        raise NotAMask("the mask divides by zero where its closed form does")
    if value == sympy.true or value == sympy.false:
        return sympy.Integer(0) if value == sympy.true else -sympy.oo
    return value if isinstance(value, sympy.logic.boolalg.Boolean) else sympy.expand(value)


def _is_hidden(value: Any) -> bool:
    if value is sympy.nan or value.has(sympy.nan):
        raise NotAMask("the mask is not a number (0 * infinity) where it hides")
    if isinstance(value, sympy.logic.boolalg.Boolean):
        raise NotAMask(f"whether a key is hidden depends on {value}")
    if _constant(value) <= BURIED:
        return True  # whatever is added to it: the values are compared, too
    if value.has(sympy.Piecewise, Relational):
        pieces = [v for p in value.atoms(sympy.Piecewise) for v, _ in p.args]
        if not pieces or any(v.has(-sympy.oo) or (v.is_number and v <= HIDDEN) for v in pieces):
            raise NotAMask(f"whether a key is hidden depends on {value}")
        return False
    if value.has(-sympy.oo):
        return True
    return bool(value.is_number and value <= HIDDEN)


def _constant(value: Any) -> Any:
    """The number that is added to the rest of a value."""
    fixed = value.as_independent(*value.free_symbols, *value.atoms(AppliedUndef), as_Add=True)[0]
    return fixed if fixed.is_number and fixed.is_real else sympy.Integer(0)


def _visible_distances(points: list[int], hidden: set[int], text: str) -> _Visible:
    shown = [p for p in points if p not in hidden]
    if not shown:
        raise NotAMask(f"the mask hides everything: {text}")
    low, high = shown[0], shown[-1]
    if any(p in hidden for p in points if low <= p <= high):
        raise NotAMask(f"the visible distances have a gap: {text}")
    return _Visible(None if low == points[0] else low, None if high == points[-1] else high)


def _spec(seen: _Visible, limit: int | None, text: str) -> MaskSpec:
    if seen.low is None and seen.high is None:
        raise NotAMask(f"{BIDIRECTIONAL}: {text}")
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
    return _mask_of(visible_matrix(evaluate(limit), text), text)


def _biased_table(
    form: Form, evaluate: Callable[[int], Tensor], sizes: dict[str, Tensor], q: Any, k: Any
) -> Scoring | None:
    """A buffer [.., heads, q, k] that adds numbers of the head and of the distance, or of both places, to what it
    shows; None: another one."""
    text = _text(form, q, k)
    limit = min(_table_limit(form, sizes, q, k, text), LONGEST_BIAS)
    values = evaluate(limit)
    if not values.is_floating_point() or values.dim() < 2:
        return None
    values = values.expand(*values.shape[:-2], limit, limit).reshape(-1, limit, limit)
    shown = values > HIDDEN
    if not bool(shown.diagonal(dim1=1, dim2=2).any()):
        shown = shown | own_far_below(values, shown)
    if bool((values[shown] == 0).all()) or not bool((shown == shown[:1]).all()) or bool(values[shown].isinf().any()):
        return None
    by_distance = values[:, :, 0]  # distances 0 .. limit - 1
    index = torch.arange(limit)
    gaps = (index[:, None] - index[None, :]).clamp(min=0)
    off = (by_distance[:, gaps] - values)[shown].abs()
    if not bool((off > _CLOSE * (1 + values[shown].abs())).any()):
        return Scoring(_mask_of(shown[0], text), "distance", text)
    longest = min(limit, longest_rows(len(values)))
    return Scoring(_mask_of(shown[0, :longest, :longest], text), "places", text)


def _mask_of(visible: Tensor, text: str) -> MaskSpec:
    """The mask that a boolean [n, n] is, up to its size."""
    limit = len(visible)
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
