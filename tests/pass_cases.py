"""Graphs before and after one pass: what the tests of passes start from."""

from __future__ import annotations

from typing import Any

from modules import Tiny
from torch import nn

from treespec_compiler.capture.call import call_spec
from treespec_compiler.capture.capture import capture
from treespec_compiler.ir.provenance import op_name
from treespec_compiler.ir.verify import problems
from treespec_compiler.ir.weights import Source
from treespec_compiler.passes import (
    bind_kernels,
    classify,
    insert_state,
    normalize,
    select_rows,
    token_locality,
    treeify,
)
from treespec_compiler.passes import fuse as pack_linears
from treespec_compiler.passes import recognize_attention as recognize
from treespec_compiler.passes.framework.manager import Pass, run_passes
from treespec_compiler.passes.framework.state import GraphState
from treespec_compiler.passes.framework.weights import Weights

ORDER: tuple[Pass, ...] = (
    normalize.PASS,
    recognize.PASS,
    classify.PASS,
    token_locality.PASS,
    treeify.PASS,
    insert_state.PASS,
    select_rows.PASS,
    pack_linears.PASS,
    bind_kernels.PASS,
)


class One(Tiny):
    layers = 1


def captured(model: nn.Module, example: Any = None, roles: dict[str, str] | None = None) -> GraphState:
    found = capture(model.eval(), call_spec(model, example, roles))
    held = {ref.name: ref.tensor for ref in found.weights.values()}
    return GraphState(
        gm=found.graph,
        tokens=found.tokens,
        position_inputs=found.positions,
        weights=Weights(held.__getitem__, {n: Source.of(r.name, r.tensor) for n, r in found.weights.items()}),
        length=found.length,
        fake_mode=found.fake_mode,
        guards=found.guards,
        written=list(found.written),
    )


def before(model: nn.Module, step: Pass) -> GraphState:
    """The graph that `step` gets."""
    state = captured(model)
    run_passes(state, ORDER[: ORDER.index(step if step in ORDER else pack_linears.PASS)])
    return state


def applied(model: nn.Module, step: Pass) -> tuple[list[str], list[str], int, GraphState]:
    """Ops before, ops after, matches."""
    state = before(model, step)
    old = ops(state)
    record = next(iter(run_passes(state, [step])))
    assert problems(state.graph, state.level) == []
    return old, ops(state), record.matches, state


def ops(state: GraphState) -> list[str]:
    return [op_name(n) for n in state.graph.nodes if n.op == "call_function"]


def only(names: list[str], *wanted: str) -> list[str]:
    return [n for n in names if n in wanted]
