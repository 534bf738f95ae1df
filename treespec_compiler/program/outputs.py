"""Names of what a program returns: `logits`; `hidden:k`, the residual stream after k attention layers; `hidden:head`,
what the head reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..errors import InvalidOption
from ..ir.outputs import HEAD, PREFIX
from ..ir.verify import LOGITS
from ..passes.framework.state import GraphState
from .executor import Executor


def taps_of(outputs: Sequence[str], layers: int) -> tuple[str, ...]:
    """The names of hidden states among these, in order of layers, each once; raises `InvalidOption`.

    `layers` is the number of attention layers: k goes from 0, what the first of them reads, to it.
    """
    fix = f'Ask for some of these, such as outputs=("{LOGITS}", "{PREFIX}{layers}").'
    expected = f"names out of {LOGITS}, {PREFIX}0 to {PREFIX}{layers} and {HEAD}"
    if isinstance(outputs, str) or not isinstance(outputs, Sequence) or not outputs:
        raise InvalidOption(name="outputs", got=outputs, expected=expected, fix=fix)
    found: set[int] = set()
    for name in outputs:
        if name in (LOGITS, HEAD):
            continue
        number = name.removeprefix(PREFIX) if isinstance(name, str) and name.startswith(PREFIX) else ""
        if not number.isdecimal() or str(int(number)) != number or int(number) > layers:
            raise InvalidOption(name="outputs", got=name, expected=expected, fix=fix)
        found.add(int(number))
    return (*(f"{PREFIX}{k}" for k in sorted(found)), *([HEAD] if HEAD in outputs else []))


def tapped(state: GraphState, taps: tuple[str, ...]) -> tuple[GraphState, Mapping[str, Tensor]]:
    """A copy of the graph that returns these hidden states as well; raises `Unsupported` where it has no such value."""
    from ..passes.tap import tap

    state = state.copy()
    tap(state, taps)
    return state, {}


def named(outputs: Sequence[str], executor: Executor, values: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of a graph's outputs, these."""
    found = dict(zip(executor.state.outputs, values, strict=True))
    return {name: found[name] for name in outputs}
