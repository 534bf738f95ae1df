"""Deciding what a mask adds to the scores of the keys it shows."""

from __future__ import annotations

import math
from typing import Any

import sympy
from torch import Tensor


class NotAMask(Exception):
    """The closed form is no mask or bias of a known kind; the text says what it is instead."""


class NoDistance(NotAMask):
    """A bias of places that is no function of the distance."""


def bias_kind(
    value: Any,
    distance: sympy.Symbol,
    q: sympy.Symbol,
    k: sympy.Symbol,
    length: sympy.Symbol,
    sizes: dict[str, Tensor],
    text: str,
    sinks: bool = False,
) -> tuple[str, int | None]:
    """("" | "slopes" | "distance", context limit) of the value added at visible keys, in terms of k and q - k.

    Softmax does not see what is constant along a row, so only the dependence on k matters:
    slope * k + anything(q) is ALiBi, and a function of q - k alone is a relative bias. Beside sinks a constant counts,
    and only slope * (k - q) is ALiBi.
    """
    in_q_and_k = sympy.expand(value.xreplace({distance: q - k}))
    slope = sympy.diff(in_q_and_k, k)
    if not slope.free_symbols & {q, k, length} and not slope.has(sympy.Derivative, sympy.Subs):
        rest = sympy.expand(in_q_and_k - slope * k)
        if k not in rest.free_symbols and not (sinks and sympy.expand(rest + slope * q) != 0):
            return ("slopes" if slope != 0 else ""), None
    if value.free_symbols & {k, q, length}:
        raise NoDistance(f"attention scores get a bias that is no function of the distance q - k: {text}")
    return "distance", _distance_limit(value, distance, sizes, text)


def _distance_limit(value: Any, distance: sympy.Symbol, sizes: dict[str, Tensor], text: str) -> int:
    """Distances that every table in the bias covers."""
    limits = []
    for read in value.atoms(sympy.core.function.AppliedUndef):
        for size, index in zip(sizes[str(read.func)].shape, read.args, strict=True):
            if distance in index.free_symbols:
                offset = sympy.expand(index - distance)
                if not offset.is_Integer or offset < 0:
                    return LONGEST_BIAS
                limits.append(int(size) - int(offset))
    return min([LONGEST_BIAS, *limits])


def longest_rows(heads: int) -> int:
    """The most places for which a bias by place and distance is tabulated, [places, heads, distances]."""
    return min(LONGEST_BIAS, math.isqrt(MOST_ROWS // heads))


# A bias by place and distance has at most this many numbers: 32 MiB of float32.
MOST_ROWS = 1 << 23
# A relative bias is tabulated for distances below this.
LONGEST_BIAS = 2048
