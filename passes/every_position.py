"""every position: the logits are [1, T, V], with a row for each token, whatever the model returns.

A model that applies its head to the last token alone (`head(x[:, -1])`) says of a text what the head says of the last
token; with the pick taken away, row t says what the model says of the first t + 1 tokens, since the rest of the graph
is proved causal and the head to act on each token alone. Other orders of dimensions are brought into this one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.specs import EVERY_ROW, LogitsSpec

from .forms.closed_form import shape_of
from .framework.manager import Pass
from .framework.state import GraphState
from .rows.for_all import for_every_token
from .rows.last_token import last_token_only

aten = torch.ops.aten


def every_position(state: GraphState) -> int:
    return _all_rows(state) + _in_order(state)


def _all_rows(state: GraphState) -> int:
    if not state.model_logits.last:
        return 0
    found = last_token_only(state)
    logits = None if found is None else for_every_token(state, *found)
    if logits is None:
        return 0
    _return(state, logits)
    return len(found[0]) if found is not None else 0


def _in_order(state: GraphState) -> int:
    """The logits as [1, T, V], where T and V are the only sizes."""
    logits, shape = state.logits, shape_of(state.logits)
    tokens = [i for i, s in enumerate(shape) if s == state.length]
    if len(tokens) != 1:
        return 0
    at = LogitsSpec.of(shape, state.length).vocabulary % len(shape)
    if at == tokens[0] or any(s != 1 for i, s in enumerate(shape) if i not in (at, tokens[0])):
        return 0
    state.logits_given = EVERY_ROW
    if len(shape) == 3 and (tokens[0], at) == (1, 2):
        return 0
    if at != len(shape) - 1:
        order = [i for i in range(len(shape)) if i != at]
        logits = state.call(aten.permute.default, (logits, [*order, at]), like=state.output)
    size = state.call(aten.sym_size.int, (state.node(state.tokens), 1), like=state.output)
    _return(state, state.call(aten.reshape.default, (logits, [1, size, int(shape[at])]), like=state.output))
    return 1


def _return(state: GraphState, logits: fx.Node) -> None:
    given: Any = state.output.args[0]
    state.output.args = ((logits, *given[1:]),)
    state.rewritten()
    state.clean()


PASS = Pass(
    "every position",
    every_position,
    before="normalized graph",
    after="the logits are [1, T, V], also those of a model that gives one row, of the last token",
    needs=("normalize",),
    place_before=("choose regime",),
)
