"""discharge guards, as a pass of the pipeline: see `guards` for what it decides and how."""

from __future__ import annotations

import logging

from .framework.manager import Pass
from .framework.state import GraphState
from .guards import discharge_guards

log = logging.getLogger("treespec.guards")


def run(state: GraphState) -> int:
    if state.other_length is None:
        log.info("the model is not at hand: %d guards on the number of tokens stay as they are", len(state.guards))
        return 0
    guards = len(state.guards)
    limits = discharge_guards(state, state.other_length, state.max_context)
    state.limits += limits
    return guards


PASS = Pass(
    "discharge guards",
    run,
    before="classified graph with guards on the number of tokens",
    after="every guard is a capacity of the context or proved to mean nothing; where the first trace was too short to "
    "show what a longer one does, the longer one's graph",
)
