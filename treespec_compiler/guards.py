"""discharge guards: conditions on the number of tokens that the trace took one side of.

In the tree program T counts nodes, not context, so no branch on T may be left undecided. For each guard the model is
analysed once more on the other side. If the other side raises an error (an assertion, a table that ends), the bound
becomes the context's capacity; if it proves to be the same program, the guard means nothing; otherwise the model is
refused, since the trace was too short, or too long, to show what the model does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy

from .errors import TreespecError, Unsupported
from .ir.specs import Limit
from .passes.state import GraphState

# A guard's other side is looked for up to here.
LONGEST = 1 << 20


def discharge_guards(state: GraphState, analyse: Callable[[int], GraphState], max_context: int | None) -> list[Limit]:
    """Decide every guard on the number of tokens; returns the capacity limits found. Raises `Unsupported`."""
    limits: list[Limit] = []
    for guard in state.guards:
        other = _other_side(guard, state.length)
        if other is None or (max_context is not None and other > max_context):
            continue
        try:
            there = analyse(other)
        except (TreespecError, AssertionError, RuntimeError, IndexError, ValueError) as error:
            if not _is_upper_bound(guard, state.length, other):
                raise Unsupported(
                    f"the model takes another branch unless {guard} (T = {state.length} tokens), and with {other} tokens "
                    f"it cannot be analysed: {str(error).splitlines()[0]}",
                    way_out="make the forward pass the same for every number of tokens",
                ) from error
            if isinstance(error, Unsupported) and not _failed_assertion(error):
                raise _too_short(guard, state, other, f"is refused there ({error.reason})") from error
            limits.append(Limit(other - 1, f"the model stops at {other} tokens: {guard}"))
            continue
        if meaning(there) != meaning(state):
            raise _too_short(guard, state, other, "does something else there")
    return limits


def _too_short(guard: Any, state: GraphState, other: int, what: str) -> Unsupported:
    return Unsupported(
        f"the model branches on the number of tokens: the trace was made under {guard} (T = {state.length}), and with "
        f"{other} tokens it {what}, so the trace does not show what the model means",
        way_out=f"options={{'max_context': {other - 1}}} stays on this side of the branch" if other > 2 else None,
    )


def meaning(state: GraphState) -> tuple[Any, ...]:
    """What must agree for two analyses to be the same program: sites, masks, and the data graph op by op."""
    names: dict[Any, int] = {}

    def key(value: Any) -> Any:
        if hasattr(value, "op"):
            return ("%", names[value])
        if isinstance(value, (list, tuple)):
            return tuple(map(key, value))
        if isinstance(value, dict):
            return tuple((k, key(v)) for k, v in sorted(value.items()))
        return str(value)

    rows = []
    for node in state.graph.nodes:
        names[node] = len(names)
        rows.append(
            (node.op, str(node.target) if node.op == "call_function" else node.op, key(node.args), key(node.kwargs))
        )
    masks = tuple((s.mask.window, s.mask.limit, s.scale, s.heads, s.kv_heads) for s in state.sites)
    return masks, tuple(rows)


def _other_side(guard: Any, length: sympy.Symbol) -> int | None:
    """The length nearest to the example on which the guard fails; None when it holds for every length from 2 on."""
    for n in _candidates(guard):
        if guard.free_symbols != {length}:
            raise Unsupported(f"a condition on sizes cannot be decided: {guard}")
        if not bool(guard.xreplace({length: sympy.Integer(n)})):
            return n
    return None


def _candidates(guard: Any) -> list[int]:
    numbers = {int(x) for x in guard.atoms(sympy.Integer)}
    near = {abs(n) + e for n in numbers for e in (-1, 0, 1)} | set(range(2, 40))
    return sorted((n for n in near if 2 <= n <= LONGEST), key=lambda n: (n > 40, n))


def _is_upper_bound(guard: Any, length: sympy.Symbol, other: int) -> bool:
    """Whether the guard holds for every shorter length that matters and fails from `other` on."""
    below = range(max(2, other - 40), other)
    return all(bool(guard.xreplace({length: sympy.Integer(n)})) for n in below)


def _failed_assertion(error: Unsupported) -> bool:
    """Whether the refusal is Dynamo's account of an assertion or exception raised by the model itself."""
    text = error.reason.lower()
    return "assert" in text or "raise" in text or "observed exception" in text
