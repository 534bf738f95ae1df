"""Masks that are predicates of absolute positions: the first tokens and a window, strides, documents by constants.

Positions are known in a tree, so any predicate of q and k that hides what comes later is fine there. From a closed form
it is read by trying every combination of its comparisons; from a buffer's values by trying the patterns people use, and
comparing every element.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from torch import Tensor

from treespec_compiler.ir.predicates import K, Q, parse, text
from treespec_compiler.ir.specs import MaskSpec

# An additive mask value at or below this hides a key: exp(-1e4) is 0 in float32, and models use -1e4 and lower.
HIDDEN = -1e4
# Comparisons in a mask, of which every combination is looked at; documents in a buffer.
_MOST_COMPARISONS, _MOST_DOCUMENTS = 7, 16
# Places that a prefix is looked for among.
_FEW = 12


def pattern_of_form(expr: Any, q: sympy.Symbol, k: sympy.Symbol) -> str | None:
    """`_pattern`; None where conditions compare what has no order."""
    try:
        return _pattern(expr, q, k)
    except (TypeError, ValueError):  # sympy orders no undefined values
        return None


def _pattern(expr: Any, q: sympy.Symbol, k: sympy.Symbol) -> str | None:
    """The text of a predicate beside `k <= q` (`MaskSpec.pattern`), or None where the form is none, shows later keys,
    or hides a token from itself."""
    expr = sympy.sympify(expr).xreplace({q: Q, k: K})
    if expr.free_symbols - {Q, K} or expr.atoms(AppliedUndef, sympy.log):
        return None
    gaps: dict[Any, tuple[Any, bool]] = {}
    for atom in expr.atoms(Relational):
        if any(side.has(Relational) for side in atom.args):
            continue  # decided by those inside
        gap = _gap(atom)
        if gap is None:
            return None
        gaps[atom] = gap
    known = list(dict.fromkeys(gap for gap, _ in gaps.values()))
    causal = _gap(sympy.Le(K, Q))
    if len(known) > _MOST_COMPARISONS or causal is None or causal[0] not in known:
        return None
    others = [gap for gap in known if gap != causal[0]]
    shown: list[tuple[bool, ...]] = []
    for values in itertools.product((False, True), repeat=len(known)):
        holds = dict(zip(known, values, strict=True))
        seen = _shows(
            expr.xreplace({atom: sympy.true if holds[g] == way else sympy.false for atom, (g, way) in gaps.items()})
        )
        if seen is None or (seen and holds[causal[0]] != causal[1]):
            return None
        if seen:
            shown.append(tuple(holds[gap] for gap in others))
    return _written(others, shown)


def whole_prefix(expr: Any, q: sympy.Symbol, k: sympy.Symbol) -> bool:
    """Whether some of the first queries see later keys, and not all queries as many (a prefix-LM)."""
    expr = sympy.sympify(expr)
    if expr.free_symbols != {q, k} or expr.atoms(AppliedUndef):
        return False
    places = range(_FEW)
    try:
        seen = {
            (i, j): _shows(expr.xreplace({q: sympy.Integer(i), k: sympy.Integer(j)})) for i in places for j in places
        }
    except (TypeError, ValueError):  # sympy orders no undefined values
        return False
    later = {i: sum(bool(seen[i, j]) for j in places if j > i) for i in places}
    return all(seen[i, i] for i in places) and later[0] > 0 == later[_FEW - 2]


def _written(others: list[Any], shown: list[tuple[bool, ...]]) -> str | None:
    """The text of the combinations that are shown, if each token is shown to itself."""
    own = {gap: _at_itself(gap) for gap in others}
    for values in itertools.product((False, True), repeat=len(others)):
        if all(own[gap] in (None, value) for gap, value in zip(others, values, strict=True)) and values not in shown:
            return None
    names = sympy.symbols(f"x0:{len(others)}")
    formula = sympy.SOPform(names, [[int(v) for v in row] for row in shown]) if others else sympy.true
    if formula in (sympy.true, sympy.false):
        return None
    written = _text(formula, dict(zip(names, others, strict=True)))
    try:
        return written if parse(written) is not None else None
    except ValueError:
        return None


def _gap(atom: Any) -> tuple[Any, bool] | None:
    """(comparison, whether the atom says it or its opposite): `gap <= 0` or `gap == 0` over whole numbers."""
    lhs, rhs = atom.lhs, atom.rhs
    if isinstance(atom, (sympy.Gt, sympy.Ge)):
        lhs, rhs = rhs, lhs
    gap = sympy.expand(lhs - rhs)
    if not gap.is_integer or any(not c.is_Integer for c in gap.as_coefficients_dict().values()):
        return None
    if isinstance(atom, (sympy.Eq, sympy.Ne)):
        gap = -gap if gap.could_extract_minus_sign() else gap
        return ("==", gap), isinstance(atom, sympy.Eq)
    gap = gap + 1 if isinstance(atom, (sympy.Gt, sympy.Lt)) else gap
    slope = gap.as_independent(Q, K, as_Add=True)[1]
    if slope.could_extract_minus_sign():  # not (gap <= 0) is 1 - gap <= 0
        return ("<=", sympy.expand(1 - gap)), False
    return ("<=", gap), True


def _at_itself(gap: Any) -> bool | None:
    """Whether a comparison holds where q is k; None: for some."""
    value = sympy.expand(gap[1].xreplace({K: Q}))
    if not value.is_number:
        return None
    return bool(value == 0) if gap[0] == "==" else bool(value <= 0)


def _shows(value: Any) -> bool | None:
    """Whether a mask of this value shows a key; None where it is neither hidden nor left as it is."""
    if value in (sympy.true, sympy.false):
        return bool(value)
    value = sympy.sympify(value)
    if value is sympy.nan or value.has(-sympy.oo, sympy.nan):  # 0 * infinity is of no combination that there is
        return False
    if not value.is_number or not value.is_real:
        return None
    return True if value == 0 else False if value <= HIDDEN else None


def _text(formula: Any, names: dict[Any, Any]) -> str:
    if formula in names:
        sign, gap = names[formula]
        return _compared(sign, gap)
    if isinstance(formula, sympy.Not):
        sign, gap = names[formula.args[0]]
        return _compared({"==": "!=", "<=": ">"}[sign], gap)
    joined = " & " if isinstance(formula, sympy.And) else " | "
    return joined.join(f"({_text(part, names)})" for part in sorted(formula.args, key=str))


_TURNED = {"==": "==", "!=": "!=", "<=": ">=", ">": "<"}


def _compared(sign: str, gap: Any) -> str:
    """`gap` against 0, with the query first where there is one."""
    constant, rest = gap.as_independent(Q, K, as_Add=True)
    if rest.coeff(Q).is_negative or (Q not in rest.free_symbols and rest.could_extract_minus_sign()):
        rest, constant, sign = sympy.expand(-rest), -constant, _TURNED[sign]
    return f"{_whole(rest)} {sign} {-constant}"


def _whole(expr: Any) -> str:
    """As `predicates.parse` reads it: whole division for a floor."""
    if not expr.atoms(sympy.floor, sympy.Mod):
        return text(expr)
    if isinstance(expr, sympy.Add):
        return " + ".join(f"({_whole(part)})" for part in expr.args)
    if isinstance(expr, sympy.Mul):
        return " * ".join(f"({_whole(part)})" for part in expr.args)
    if isinstance(expr, sympy.floor):
        above, below = sympy.fraction(sympy.together(expr.args[0]))
        return f"(({_whole(above)}) // {below})"
    if isinstance(expr, sympy.Mod):
        return f"(({_whole(expr.args[0])}) % {expr.args[1]})"
    return text(expr)


def pattern_of_values(visible: Tensor) -> str | None:
    """The same for a boolean matrix [n, n] of a buffer."""
    n = len(visible)
    if not torch.equal(visible, visible.tril()) or not bool(visible.diagonal().all()):
        return None
    places = torch.arange(n)
    for found in _candidates(visible):
        if torch.equal(MaskSpec(pattern=found).visible(places[:, None], places), visible):
            return found
    return None


def chunk_of_values(visible: Tensor) -> int | None:
    """The size of the chunks that a boolean matrix [n, n] shows, each query its own up to itself; None: it is none."""
    begins = visible.int().argmax(1)
    size = int((begins > 0).int().argmax()) if len(visible) else 0
    places = torch.arange(len(visible))
    seen = MaskSpec(chunk=size).visible(places[:, None], places) if size else None
    return size if seen is not None and torch.equal(seen, visible) else None


def _candidates(visible: Tensor) -> Iterator[str]:
    n, last = len(visible), visible[-1]
    hidden = (~last).nonzero().flatten()
    if len(hidden):
        first, window = int(hidden[0]), n - 1 - int(hidden[-1])
        if first:
            yield f"(k < {first}) | (q - k < {window})"
        further = (last[: n - window].flip(0)).nonzero().flatten()
        if len(further):
            step = window + int(further[0])
            yield f"(q - k < {window}) | ((q - k) % {step} == 0)"
            yield f"(q - k < {window}) | (k % {step} == {step - 1})"
    starts = visible.int().argmax(1)
    begins = [int(b) for b in (starts[1:] != starts[:-1]).nonzero().flatten() + 1]
    if 0 < len(begins) <= _MOST_DOCUMENTS:
        yield " & ".join(f"((q < {b}) | (k >= {b}))" for b in begins)
