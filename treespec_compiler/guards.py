"""discharge guards: conditions on the number of tokens that the trace took one side of.

In the tree program T counts nodes, not context, so no branch on T may be left undecided. Lengths are cut into regions
by the guards; for every region but the trace's own the model is analysed once more. If that raises an error (an
assertion, a table that ends), the region's start bounds the context; if it proves to be the same program, the branch
means nothing; otherwise the model is refused, since the trace was too short, or too long, to show what it does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import sympy
from torch import Tensor

from .errors import PassError, TreespecError, Unsupported
from .ir.specs import Limit
from .passes.manager import Pass
from .passes.state import GraphState

# Lengths are looked at up to here, and each one by itself up to DECIDED when a guard is not linear in T.
LONGEST = 1 << 20
DECIDED = 4096
# Analyses of other regions; each takes as long as the first.
MOST_REGIONS = 8

Guards = Sequence[sympy.Basic]


def discharge_guards(state: GraphState, analyse: Callable[[int], GraphState], max_context: int | None) -> list[Limit]:
    """Decide every guard on the number of tokens; returns the capacity limits found. Raises `Unsupported`."""
    limits: list[Limit] = []
    regions: list[Guards] = [_about_length(state.guards, state.length)]
    example = int(state.node(state.tokens).meta["val"].shape[1].node.hint)
    ceiling = max_context or LONGEST
    if any(_threshold(g, state.length) is None for g in regions[0]):
        limits.append(Limit(DECIDED, f"a condition on the number of tokens is decided up to here: {regions[0][0]}"))
        ceiling = min(ceiling, DECIDED)
    for _ in range(MOST_REGIONS):
        other = _uncovered(regions, state.length, ceiling)
        if other is None:
            return limits
        guard = next(g for g in regions[0] if not _holds(g, state.length, other))
        try:
            there = analyse(other)
        except PassError:  # a bug of ours says nothing about the model
            raise
        except (TreespecError, AssertionError, RuntimeError, IndexError, ValueError) as error:
            if other < example:
                raise Unsupported(
                    f"the model takes another branch unless {guard} (T = {state.length} tokens), and with {other} "
                    f"tokens it cannot be analysed: {str(error).splitlines()[0]}",
                    way_out="make the forward pass the same for every number of tokens",
                ) from error
            if _is_lone(regions[0], state.length, other) and isinstance(error, Unsupported) and _specialised(error):
                state.lone_lengths.append(other)  # compared with the model itself once there is something to run
                regions.append([sympy.Eq(state.length, other)])
                continue
            if isinstance(error, Unsupported) and not _ends_there(error):
                raise _too_short(guard, state, other, f"is refused there ({error.reason})") from error
            limits.append(Limit(other - 1, f"the model stops at {other} tokens: {guard}"))
            ceiling = other - 1
            continue
        if meaning(there) != meaning(state):
            raise _too_short(guard, state, other, "does something else there")
        regions.append(_about_length(there.guards, there.length, state.length))
    raise Unsupported(
        f"the model branches on the number of tokens in more than {MOST_REGIONS} ways: "
        f"{', '.join(map(str, regions[0]))}",
        way_out="make the forward pass the same for every number of tokens",
    )


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

    rows: list[Any] = []
    for node in state.graph.nodes:
        names[node] = len(names)
        what: Any = str(node.target) if node.op == "call_function" else node.op
        if node.op == "placeholder":
            what = id(state.constants[node.name]) if node.name in state.constants else "input"
        elif node.op == "get_attr":
            what = _contents(getattr(state.gm, str(node.target)))
        rows.append((node.op, what, key(node.args), key(node.kwargs)))
    masks = tuple((s.mask, s.scale, s.heads, s.kv_heads, s.softcap, s.bias, s.sinks) for s in state.sites)
    return masks, tuple(rows), tuple(_contents(pack.build(state.constants)) for pack in state.packs.values())


def _contents(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return id(value)
    data = repr((value.dtype, value.tolist())).encode()
    return hashlib.sha256(data).hexdigest()


def _about_length(guards: Guards, length: sympy.Symbol, name: sympy.Symbol | None = None) -> list[sympy.Basic]:
    """The guards, which must be on the number of tokens alone, under one name for it."""
    for guard in guards:
        if guard.free_symbols - {length}:
            raise Unsupported(f"a condition on sizes cannot be decided: {guard}")
    return [g.xreplace({length: name}) if name is not None else g for g in guards]


def _holds(guard: Any, length: sympy.Symbol, n: int) -> bool:
    return bool(guard.xreplace({length: sympy.Integer(n)}))


def _threshold(guard: Any, length: sympy.Symbol) -> sympy.Expr | None:
    """Where a relation that is linear in T changes; None for any other condition."""
    if not isinstance(guard, sympy.core.relational.Relational):
        return None
    gap = sympy.expand(guard.lhs - guard.rhs)
    if not gap.is_polynomial(length) or sympy.degree(gap, length) != 1:
        return None
    return -gap.coeff(length, 0) / gap.coeff(length, 1)


def _uncovered(regions: Sequence[Guards], length: sympy.Symbol, ceiling: int) -> int | None:
    """The smallest number of tokens (2 or more) that no analysed region contains.

    Linear guards hold or fail on whole intervals, so one look on each side of every threshold decides all lengths.
    """
    points = {2, ceiling}
    for guard in (g for region in regions for g in region):
        at = _threshold(guard, length)
        if at is None:
            points |= set(range(2, min(ceiling, DECIDED) + 1))
        else:
            points |= {int(sympy.floor(at)) + e for e in (-1, 0, 1, 2)}
    for n in sorted(p for p in points if 2 <= p <= ceiling):
        if not any(all(_holds(g, length, n) for g in region) for region in regions):
            return int(n)
    return None


# One length is compared by running the model on that many tokens; above this the context just ends before it.
LONGEST_RUN = 2048


def _is_lone(guards: Guards, length: sympy.Symbol, other: int) -> bool:
    """Whether only this one length is excluded: `T != other`."""
    failed = [g for g in guards if not _holds(g, length, other)]
    return other <= LONGEST_RUN and all(_holds(g, length, n) for g in failed for n in (other - 1, other + 1))


def _specialised(error: Unsupported) -> bool:
    return "specialised it" in error.reason


def _ends_there(error: Unsupported) -> bool:
    """Whether the model has no graph of its own there: it raises, shapes do not fit, or T is a constant.

    The context then ends before that length, which is sound whatever the model would do beyond.
    """
    text = error.reason.lower()
    return any(sign in text for sign in ("assert", "raise", "observed exception", "cannot capture", "specialised it"))


def discharge(state: GraphState) -> int:
    """Decide the state's guards; returns how many there were."""
    if state.guards:
        assert state.other_length is not None
        state.limits += discharge_guards(state, state.other_length, state.max_context)
    return len(state.guards)


PASS = Pass(
    "discharge guards",
    discharge,
    before="proved graph",
    after="unchanged; every condition on the number of tokens is a bound on the context, or means nothing",
    changes=False,
)
