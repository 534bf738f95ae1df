"""Dimensions that hold several rows for each token, in an order that is known.

Mixture-of-experts code flattens [T, k] choices into T * k rows, sorts the rows by expert, and sorts them back. A `Rows`
says to which token each row of such a dimension belongs; as long as an op acts on each row alone it acts on each token
alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
from torch import fx

from ..forms.closed_form import Shape
from .axes import Mixes


@dataclass(frozen=True)
class Repeats:
    """outer * T * inner rows; row r belongs to token (r // inner) % T."""

    outer: int = 1
    inner: int = 1

    def size(self, length: sympy.Expr) -> sympy.Expr:
        return self.outer * length * self.inner


TOKENS = Repeats()


@dataclass(frozen=True)
class Rows:
    """Dimension `at` holds the rows of `repeats`; with `order`, row r is row order[r] of it.

    `order` is the sort that made the permutation. Orders of different sorts are different, even of equal keys.
    """

    at: int
    repeats: Repeats = TOKENS
    order: fx.Node | None = None

    def moved(self, at: int) -> Rows:
        return replace(self, at=at)

    def __str__(self) -> str:
        rows = f"{self.repeats.outer} x tokens x {self.repeats.inner}".replace("1 x ", "").replace(" x 1", "")
        return rows if self.order is None else f"{rows} in the order of {self.order.name}"


@dataclass(frozen=True)
class Uniform:
    """Dimension `at` depends on the number of tokens in size only: every row holds the same value."""

    at: int


@dataclass(frozen=True)
class GroupSizes:
    """How many rows have each id (`kind` "counts"), or where each id's rows end once sorted ("ends").

    It depends on every token, so only a grouped matmul over rows sorted by the same ids may read it. `ids` is the node
    whose values were counted, `groups` the number of ids.
    """

    kind: str
    ids: fx.Node
    groups: int


Place = int | None | Rows | Uniform | GroupSizes
"""What is known of a tensor: int, the token dimension; None, no token in it; or one of the above."""


def rows_of(place: Place) -> Rows | None:
    """The place as rows, where it is any."""
    if isinstance(place, int):
        return Rows(place)
    return place if isinstance(place, Rows) else None


def simplest(rows: Rows) -> int | Rows:
    """A plain token dimension is its number."""
    return rows.at if rows.repeats == TOKENS and rows.order is None else rows


def reshaped(rows: Rows, before: Shape, after: Shape, length: sympy.Expr) -> Rows:
    """Where rows stand after a reshape that merges the tokens with, or splits them from, other dimensions.

    In element order the tensor is [lead * outer, T, inner * rest]. A dimension of the result that holds T splits it in
    the same place when what stands before it divides lead * outer.
    """
    repeats = rows.repeats
    for at, size in enumerate(after):
        if length not in size.free_symbols:
            continue
        outer = _quotient(sympy.prod(before[: rows.at]) * repeats.outer, sympy.prod(after[:at]))
        inner = _quotient(size, outer * length) if outer is not None else None
        if outer is not None and inner is not None and rows.order is None:
            return Rows(at, Repeats(outer, inner))
        if rows.order is not None and size == repeats.size(length) and outer == repeats.outer:
            return rows.moved(at)
    what = "cuts the tokens apart" if rows.order is None else f"splits rows that are in the order of {rows.order.name}"
    raise Mixes(f"a reshape from {list(before)} to {list(after)} {what}")


def _quotient(a: sympy.Expr | int, b: sympy.Expr | int) -> int | None:
    """a / b where that is a positive integer."""
    value = sympy.cancel(sympy.sympify(a) / b)
    return int(value) if value.is_Integer and value > 0 else None


@dataclass(frozen=True)
class RowNumbers:
    """A tensor whose value at each row is the number of a row of `repeats` that belongs to the same token.

    `exact`: it is the row's own number, so over all rows the values are a permutation.
    """

    repeats: Repeats
    exact: bool


@dataclass(frozen=True)
class Inverse:
    """The inverse of the permutation that `order` made."""

    order: fx.Node
