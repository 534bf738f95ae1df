"""The composition of the compiler: capture, passes, checks. The result is a graph ready to be lowered."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import codegen  # noqa: F401  (enters the kernels into the registry)
from .capture import CallSpec, Capture, WeightRef, capture
from .errors import PassError, Unsupported
from .guards import discharge_guards
from .ir import ops, verify
from .ir.registry import best_kernel
from .ir.specs import Limit
from .options import Options
from .passes import bind_kernels, classify, insert_state, normalize, pack_linears, recognize, select_rows
from .passes import token_locality, treeify
from .passes.manager import Check, History, Pass, run_passes
from .passes.state import GraphState

log = logging.getLogger("treespec.pipeline")

# What is proved about the captured graph, and then what is rewritten.
ANALYSIS: tuple[Pass, ...] = (normalize.PASS, recognize.PASS, classify.PASS, token_locality.PASS)
REWRITES: tuple[Pass, ...] = (treeify.PASS, insert_state.PASS, select_rows.PASS)


@dataclass
class Converted:
    """A tree program before lowering: the graph, what was proved, and its history."""

    state: GraphState
    weights: dict[str, WeightRef]
    history: History
    capture_seconds: float
    max_context: int | None
    limits: list[Limit]
    input_vocab: int | None


def analyse(captured: Capture, checks: list[Check]) -> tuple[GraphState, History]:
    """Run the proofs on a captured graph."""
    state = GraphState(
        gm=captured.graph,
        tokens=captured.tokens,
        position_inputs=captured.positions,
        constants={name: ref.tensor for name, ref in captured.weights.items()},
        length=captured.length,
        fake_mode=captured.fake_mode,
        guards=captured.guards,
    )
    return state, run_passes(state, ANALYSIS, checks)


def convert(model: nn.Module, call: CallSpec, options: Options, checks: list[Check] | None = None) -> Converted:
    """Turn a decoder into a tree-verification graph, or raise `Unsupported`."""
    refuse_subclasses(model)
    started = time.perf_counter()
    captured = capture(model, call)
    capture_seconds = time.perf_counter() - started
    levels: list[Check] = [] if options.verify_each == "none" else [check_level]
    checks = levels + (checks or [])
    state, history = analyse(captured, checks)

    def analyse_other(tokens: int) -> GraphState:
        """The proofs for an example prompt of another length; nothing of it is kept."""
        return analyse(capture(model, call.with_length(tokens)), levels)[0]

    state.limits += discharge_guards(state, analyse_other, options.max_context)
    rewrites = list(REWRITES)
    device, dtype = _device_and_dtype(state)
    if options.kernels == "auto" and best_kernel(ops.packed_linear, device, dtype) is not None:
        rewrites.append(pack_linears.PASS)
    if options.kernels != "reference":
        rewrites.append(bind_kernels.PASS)
    later = run_passes(state, rewrites, checks)
    history.records += later.records
    _drop_unused_inputs(state)
    max_context, limits = _context(state.limits, options.max_context)
    return Converted(state, captured.weights, history, capture_seconds, max_context, limits, _input_vocab(state))


def check_level(state: GraphState, name: str) -> None:
    """The verifier of the graph's level, as a check for the pass manager."""
    found = verify.problems(state.graph, state.level)
    if found:
        raise PassError(pass_name=name, problem="; ".join(found))


def refuse_subclasses(model: nn.Module) -> None:
    """Capture sees plain tensors only; a subclass would be opened up into something else."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        plain = (torch.Tensor, nn.Parameter, nn.Buffer)
        if type(tensor) not in plain:
            raise Unsupported(
                f"{name} is a {type(tensor).__name__}, a tensor subclass: capture reads plain tensors only",
                node=name,
                way_out="convert the model before it is quantized or distributed",
            )


def _device_and_dtype(state: GraphState) -> tuple[torch.device, torch.dtype]:
    value: Any = state.logits.meta["val"]
    return value.device, value.dtype


def _drop_unused_inputs(state: GraphState) -> None:
    """Weights that were packed, and positions given by the caller, are not read any more."""
    for node in list(state.graph.nodes):
        if node.op == "placeholder" and not node.users and (node.name in state.constants or node.name in state.position_inputs):
            state.graph.erase_node(node)
    state.gm.recompile()


def _context(limits: list[Limit], asked: int | None) -> tuple[int | None, list[Limit]]:
    unique = sorted(dict.fromkeys(limits), key=lambda limit: limit.tokens)
    if asked is not None:
        unique = sorted([*unique, Limit(asked, "option max_context")], key=lambda limit: limit.tokens)
    return (unique[0].tokens if unique else None), unique


def _input_vocab(state: GraphState) -> int | None:
    """Rows of the table that the token ids are looked up in."""
    sizes = [
        int(node.args[0].meta["val"].shape[0])
        for node in state.graph.nodes
        if node.target is torch.ops.aten.embedding.default and _reads_tokens(state, node.args[1])
    ]
    return min(sizes) if sizes else None


def _reads_tokens(state: GraphState, node: Any) -> bool:
    while node.op == "call_function" and len(node.all_input_nodes) >= 1 and node.target is torch.ops.aten.reshape.default:
        node = node.args[0]
    return node.name == state.tokens
