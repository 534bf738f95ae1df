"""Closed forms, checked by value.

Algebra over integers and reals says what a mask, a bias or a position is; the model's own numbers round and wrap. So
the part of the graph that computes one is run and compared: for every small number of tokens, around every number that
is written in it, and at samples up to the longest context, always at the last tokens too.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from treespec_compiler.ir.provenance import op_name

from .evaluate import TooLarge, Values, cone
from .form import BY_PLACE, size_of

# Contexts are looked at up to here, as in `guards`.
LONGEST = 1 << 20
# Up to here every place is compared; above it, samples.
DENSE = 512
# Up to here each number of tokens is looked at where arithmetic on it might single one out.
EACH = 4096
SECONDS = 8.0  # for that; what is looked at may be a square of it
# Numbers written in the graph that samples are taken around, smallest first.
_MOST_LITERALS = 24
_ODD_LENGTHS = (1021, 1500, 2049, 3001, 4099, 8191, 16411, 32771, 65537, 100003, 131101, 262147, 524309, LONGEST)


class SampledValues:
    """The values of one node for any number of tokens up to `ceiling`."""

    def __init__(
        self, node: fx.Node, gm: fx.GraphModule, tokens: str, constants: Mapping[str, Tensor], ceiling: int | None
    ) -> None:
        self.node, self.gm, self.tokens, self.constants = node, gm, tokens, constants
        self.ceiling = min(ceiling or LONGEST, LONGEST)
        self.literals = _literals(node)

    def values(self, n: int) -> Values:
        return Values(self.gm, self.tokens, self.constants, n)

    def at(self, n: int, index: Sequence[Tensor | None]) -> Tensor:
        """Elements for n tokens; None: all along a dimension. Dimensions of size 1 have place 0 alone."""
        values = self.values(n)
        sizes = values.shape(self.node)
        places = [
            torch.arange(s) if p is None else torch.zeros(1, dtype=torch.int64) if s == 1 else p
            for s, p in zip(sizes, index, strict=True)
        ]
        return values.at(self.node, tuple(places))

    def lengths(self) -> list[int]:
        """Numbers of tokens to look at, ascending."""
        few = set(range(2, 131 if self.node.meta.get(BY_PLACE) else 18)) | {31, 64, 97, 130, 257, DENSE}
        around = {v + e for v in self.literals for e in (-1, 0, 1, 2, 5)}
        found = few | around | set(_ODD_LENGTHS) | {self.ceiling}
        return sorted(n for n in found if 2 <= n <= self.ceiling)

    def places(self, n: int, count: int = 96) -> Tensor:
        """Places among n: all of them where they are few."""
        if n <= DENSE:
            return torch.arange(n)
        rng = random.Random(n)
        powers = [1 << i for i in range(n.bit_length())]
        near = [v + e for v in (*self.literals, *powers) for e in (-1, 0, 1)]
        near += [n - 1 - v + e for v in self.literals for e in (-1, 0, 1)]
        near += [*range(8), *range(n - 8, n)] + [rng.randrange(n) for _ in range(count)]
        return torch.tensor(sorted({p for p in near if 0 <= p < n}))

    def pairs(self, n: int) -> tuple[Tensor, Tensor]:
        """Queries and keys to look at together: near each other, far apart, and around written distances."""
        if n <= DENSE:
            return torch.arange(n), torch.arange(n)
        rng = random.Random(n)
        chosen = [0, 1, n // 3, n // 2 + 1, n - 2, n - 1, *(rng.randrange(n) for _ in range(4))]
        chosen += [v + e for v in self.literals[-6:] for e in (0, 1)]
        rows = sorted({q for q in chosen if 0 <= q < n})
        gaps = {g for v in (*self.literals, 0, 1, 2, 3, 5, 17, 100, 1000) for g in (v - 1, v, v + 1)}
        keys = {q + s * g for q in rows for g in gaps for s in (-1, 1)} | {rng.randrange(n) for _ in range(32)}
        columns = sorted({k for k in keys | set(range(4)) | {n - 1} if 0 <= k < n})
        return torch.tensor(rows), torch.tensor(columns)


def proved_up_to(sampled: SampledValues, holds: Callable[[int], bool]) -> int:
    """The largest number of tokens looked at up to which `holds(n)` is true; 0: not for the fewest.

    Where the model's own arithmetic ends (a table), or a value is too large to be computed, so do the lengths.
    """
    last = 0
    for n in sampled.lengths():
        try:
            if not holds(n):
                return last
        except (IndexError, RuntimeError, TooLarge):
            return last
        last = n
    return last


def same_up_to(sampled: SampledValues) -> int | None:
    """The number of tokens up to which a value of fixed shape is the same for each, bit for bit, as far as was looked;
    None: it is not.

    Where arithmetic on the number itself goes into it, such as `t * t // 4096`, each is looked at, up to EACH.
    """
    singled = any(map(_may_single_out, _sizes(sampled.node)))
    most, last, began = min(sampled.ceiling, EACH) if singled else sampled.ceiling, 0, time.thread_time()
    first: Tensor | None = None
    for n in range(1, most + 1) if singled else (1, *sampled.lengths()):
        if singled and time.thread_time() - began > SECONDS:
            return last
        try:
            value = sampled.values(n).whole(sampled.node)
        except (IndexError, RuntimeError, TooLarge):
            if n == 1:
                continue
            return last
        if first is not None and not same_bits(first, value):
            return None
        first, last = value, n
    return most


def by_places_alone(node: fx.Node) -> bool:
    """Whether samples of its values say what a value of places is: nothing is drawn at random or left as memory was,
    and no arithmetic on the number of tokens may single out a few numbers."""
    named = {op_name(n) for n in cone(node) if n.op == "call_function"}
    seeded = any(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) for n in cone(node))
    return not seeded and not named & _BLANK and not any(map(_may_single_out, map(_exact, _sizes(node))))


def _exact(size: sympy.Expr) -> sympy.Expr:
    """The expression without divisions that leave no rest: the size of all pairs by that of one of them."""

    def divides(f: Any) -> bool:
        return f.func.__name__ == "FloorDiv" and sympy.cancel(f.args[0] / f.args[1]).is_polynomial()

    return size.replace(divides, lambda f: sympy.cancel(f.args[0] / f.args[1]))


_BLANK = {"aten.empty", "aten.new_empty", "aten.empty_like", "aten.empty_strided"}


def _sizes(node: fx.Node) -> Iterator[sympy.Expr]:
    """Sizes, and numbers made of them, that go into a node."""
    for current in cone(node):
        value = current.meta.get("val")
        if isinstance(value, torch.SymInt):
            yield size_of(value)
        elif isinstance(value, Tensor):
            yield from (_root(size_of(s)) for s in value.shape)


def _root(size: sympy.Expr) -> sympy.Expr:
    """A number of which a size is a power, as that of all pairs is: no length has another one's."""
    return size.base if size.is_Pow and size.exp.is_Integer and size.exp > 0 else size


def _may_single_out(size: sympy.Expr) -> bool:
    """Whether an expression in the number of tokens may be the same for many of them and another for some."""
    symbols = size.free_symbols
    return bool(symbols) and not all(size.is_polynomial(s) and sympy.degree(size, s) == 1 for s in symbols)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, type and value, NaN being equal to itself."""
    if a.dtype == b.dtype and torch.equal(a, b):
        return True  # there may be a million of them
    return (
        a.is_floating_point()
        and a.dtype == b.dtype
        and torch.equal(torch.nan_to_num(a, nan=7.0), torch.nan_to_num(b, nan=7.0))
        and torch.equal(a.isnan(), b.isnan())
    )


def signature(node: fx.Node) -> Any:
    """Equal for nodes that compute the same from the same constants and sizes."""
    numbers: dict[fx.Node, int] = {}
    rows: list[Any] = []
    needed = cone(node)
    for current in node.graph.nodes:
        if current in needed:
            what = (current.name,) if current.op in ("placeholder", "get_attr") else (str(current.target),)
            arguments = fx.node.map_arg((current.args, current.kwargs), lambda n: f"%{numbers[n]}")
            found = (*what, repr(arguments))
            if found in rows:
                numbers[current] = rows.index(found)
                continue
            numbers[current] = len(rows)
            rows.append(found)
    return tuple(rows), numbers[node]


def _literals(node: fx.Node) -> list[int]:
    """Whole numbers near those that are written in the part of the graph that computes `node`."""
    found: set[int] = set()
    for current in cone(node):
        if current.op == "call_function":
            for value in _numbers((current.args, current.kwargs)):
                size = abs(value)
                inverse = round(1 / size) if 1e-6 < size < 1 else 0
                found |= {v for v in (round(size) if size < LONGEST else 0, inverse) if 1 < v < LONGEST}
    return sorted(found)[:_MOST_LITERALS]


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value == value and abs(value) != float("inf"):
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, dict):
        yield from _numbers(list(value.values()))
