"""recognize states: what keeps a state of the past is one op each (`ir.states`).

Convolutions over the tokens, and tokens that are moved back, are proved from the graph (`states.convolutions`,
`states.shifts`).
"""

from __future__ import annotations

from .framework.manager import Pass
from .framework.state import GraphState
from .states.convolutions import recognize_convolutions
from .states.shifts import recognize_shifts
from .states.specs import state_specs


def recognize_states(state: GraphState) -> int:
    recognize_convolutions(state)
    recognize_shifts(state)
    state.states = state_specs(state)
    return len(state.states)


PASS = Pass(
    "recognize states",
    recognize_states,
    before="normalized graph",
    after="each causal convolution over the tokens is one treespec::causal_convolution; `states` says what is kept",
    needs=("strip native cache",),
    place_before=("recognize attention",),
)
