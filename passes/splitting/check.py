"""The verifier of a stage's graph: what comes from other stages comes as the stream, or not at all."""

from __future__ import annotations

import torch
from torch import fx

from treespec_compiler.ir import ops
from treespec_compiler.ir.inputs import BY_NAME, STREAM, is_pool
from treespec_compiler.ir.library import definition
from treespec_compiler.ir.verify import LOGITS

from ..framework.state import GraphState

aten = torch.ops.aten


def problems(state: GraphState) -> list[str]:
    """What is wrong with the graph of the stage that `state.stage` says; an empty list when nothing is."""
    share, whole = state.stage, state.whole
    assert share is not None and whole is not None
    nodes = list(state.graph.nodes)
    found = [*_inputs(state, nodes, share.first)]
    outputs = [LOGITS] if share.last else [STREAM.name]
    if state.outputs != outputs:
        found.append(f"outputs {', '.join(state.outputs)} of stage {share.stage}, expected {', '.join(outputs)}")
    if not share.last:
        found += _handed_over(state)
    layers = whole.stages[share.stage]
    sites = [n.meta["site"] for n in nodes if definition(n.target) is ops.tree_attention]
    if sites != list(range(layers.stop - layers.start)):
        found.append(f"attention sites {sites} in a stage of layers {layers.start} to {layers.stop - 1}")
    return found


def _inputs(state: GraphState, nodes: list[fx.Node], first: bool) -> list[str]:
    found = []
    streams = [n for n in nodes if n.op == "placeholder" and n.name == STREAM.name and n.name in state.inputs]
    if bool(streams) == first or (streams and not streams[0].users):
        found.append("a first stage that reads a stream" if first else "a stage that does not read the stream")
    if not first:
        tokens = state.node(state.tokens)
        other = next((user for user in tokens.users if user.target is not aten.sym_size.int), None)
        if other is not None:
            found.append(f"a value of the tokens that does not come through the stream: {other.format_node()}")
    for node in nodes:
        known = node.name in state.weights or node.name in BY_NAME or is_pool(node.name) or node in streams
        if node.op == "placeholder" and not known and node.name not in (state.tokens, *state.position_inputs):
            found.append(f"an input that no stage has: {node.name}")
    return found


def _handed_over(state: GraphState) -> list[str]:
    """The stream is one value of all new nodes [1, T, D]."""
    value = state.output.args[0][0].meta["val"]
    if value.dim() != 3 or value.shape[0] != 1 or not isinstance(value.shape[2], int):
        return [f"a stream of shape {tuple(value.shape)}, expected [1, T, D]"]
    return []
