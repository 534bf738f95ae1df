"""discharge guards: conditions on the number of tokens that the trace took one side of.

In the tree program T counts nodes, not context, so no branch on T may be left undecided. Lengths are cut into regions
by the guards; for every region but the trace's own the model is analysed once more. If that raises an error (an
assertion, a table that ends) or cannot be converted, the region's start bounds the context; if it proves to be the same
program, the branch means nothing; otherwise the model is refused, since the trace was too short, or too long, to show
what it does. Programs are compared where both are asked: with at most n tokens no distance reaches n, so a window of n
or more is no window. A trace that is shown to be right where the first one was made takes its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import sympy
from torch import Tensor

from treespec_compiler.errors import PassError, TreespecError, Unsupported
from treespec_compiler.ir.sequence_attention import causal_attention
from treespec_compiler.ir.specs import Limit, MaskSpec

from .framework.state import GraphState

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
    ceiling = max_context or LONGEST
    for _ in range(MOST_REGIONS):
        if (limit := _decided(regions, state.length)) is not None and limit not in limits:
            limits.append(limit)
            ceiling = min(ceiling, DECIDED)
        other = _uncovered(regions, state.length, ceiling)
        if other is None:
            return limits
        guard = next(g for g in regions[0] if not _holds(g, state.length, other))
        try:
            there = analyse(other)
        except PassError:  # a bug of ours says nothing about the model
            raise
        except (TreespecError, AssertionError, RuntimeError, IndexError, ValueError) as error:
            if other < _example(state):
                raise Unsupported(
                    f"the model takes another branch unless {guard} (T = {state.length} tokens), and with {other} "
                    f"tokens it cannot be analysed: {str(error).splitlines()[0]}",
                    way_out="make the forward pass the same for every number of tokens",
                ) from error
            if _is_lone(regions[0], state.length, other) and isinstance(error, Unsupported) and _specialised(error):
                state.lone_lengths.append(other)  # compared with the model itself once there is something to run
                regions.append([sympy.Eq(state.length, other)])
                continue
            what = "stops"
            if isinstance(error, Unsupported) and not _ends_there(error):
                what = f"cannot be converted ({error.reason})"
            limits.append(Limit(other - 1, f"from {other} tokens on the model {what}: {guard}"))
            ceiling = other - 1
            continue
        if _same(there, state, _reach(there)):
            regions.append(_about_length(there.guards, there.length, state.length))
        elif _same(there, state, _reach(state)):
            regions = [
                _about_length(there.guards, there.length),
                _about_length(state.guards, state.length, there.length),
            ]
            state.become(there)
        else:
            raise _too_short(guard, state, other, "does something else there")
    raise Unsupported(
        f"the model branches on the number of tokens in more than {MOST_REGIONS} ways: "
        f"{', '.join(map(str, regions[0]))}",
        way_out="make the forward pass the same for every number of tokens",
    )


def _example(state: GraphState) -> int:
    """The number of tokens that the trace was made with."""
    return int(state.node(state.tokens).meta["val"].shape[1].node.hint)


def _decided(regions: Sequence[Guards], length: sympy.Symbol) -> Limit | None:
    """Up to where lengths are looked at one by one, where a guard is not linear in T."""
    guard = next((g for region in regions for g in region if _threshold(g, length) is None), None)
    if guard is None:
        return None
    return Limit(DECIDED, f"a condition on the number of tokens is decided up to here: {guard}")


def _too_short(guard: Any, state: GraphState, other: int, what: str) -> Unsupported:
    return Unsupported(
        f"the model branches on the number of tokens: the trace was made under {guard} (T = {state.length}), and with "
        f"{other} tokens it {what}, so the trace does not show what the model means",
        way_out=f"options={{'max_context': {other - 1}}} stays on this side of the branch" if other > 2 else None,
    )


def _same(a: GraphState, b: GraphState, reach: int | None) -> bool:
    return meaning(a, reach) == meaning(b, reach)


def _reach(state: GraphState) -> int | None:
    """The largest number of tokens that the state's guards allow; None where they do not end."""
    at = [_threshold(g, state.length) for g in _about_length(state.guards, state.length)]
    if any(t is None for t in at):
        return None
    points = {2, LONGEST} | {int(sympy.floor(t)) + e for t in at for e in (-1, 0, 1)}
    inside = [p for p in points if p >= 2 and all(_holds(g, state.length, p) for g in state.guards)]
    return None if LONGEST in inside or not inside else max(inside)


def meaning(state: GraphState, reach: int | None = None) -> tuple[Any, ...]:
    """What must agree for two analyses to be the same program of at most `reach` tokens: sites, masks, and the data
    graph op by op."""
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
        args = _attention_args(node, reach) if node.target is _ATTENTION else node.args
        rows.append((node.op, what, key(args), key(node.kwargs)))
    masks = tuple(
        (_within(s.mask, reach), s.scale, s.heads, s.kv_heads, s.softcap, s.bias, s.sinks) for s in state.sites
    )
    return masks, tuple(rows), tuple(_contents(pack.build(state.constants)) for pack in state.packs.values())


_ATTENTION = causal_attention._opoverload
# What classify leaves out of a call: chunk, softcap, slopes, bias and sinks.
_NO_CHANGES = (0, 0.0, None, None, None)


def _attention_args(node: Any, reach: int | None) -> tuple[Any, ...]:
    """All arguments of a `treespec::causal_attention`, with its mask as it is for at most `reach` tokens."""
    q, k, v, scale, window, *changes = node.args
    chunk, *rest = changes or _NO_CHANGES
    mask = _within(MaskSpec(window, chunk=chunk), reach)
    return (q, k, v, scale, mask.window, mask.chunk, *rest)


def _within(mask: MaskSpec, reach: int | None) -> MaskSpec:
    """The mask on the first `reach` tokens: a window or chunk that holds them all hides nothing."""
    if reach is None:
        return mask
    return replace(
        mask, window=0 if mask.window >= reach else mask.window, chunk=0 if mask.chunk >= reach else mask.chunk
    )


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
