"""The composition of the compiler: capture, passes, checks. The result is a graph ready to be lowered."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn

from .capture.call import CallSpec
from .capture.capture import Capture, capture
from .capture.quantized_weights import as_expression, refuse_subclasses
from .capture.reads import Reads, Traced
from .capture.weight_ref import WeightRef
from .codegen import cpu
from .converted import Converted
from .errors import InvalidPipeline, PassError
from .ir import verify
from .ir.device import profile
from .ir.specs import Limit
from .logs import logger, set_logs_from_environment
from .options import Options
from .passes.framework.found import built_in
from .passes.framework.instruments import always
from .passes.framework.manager import Check, Instrument, Pass, run_passes
from .passes.framework.plan import plan
from .passes.framework.registry import registered_passes
from .passes.framework.reproducer import ReproducerWriter
from .passes.framework.state import GraphState
from .passes.framework.weights import Weights
from .passes.locality.ids import input_vocab
from .passes.sharding.check import problems as placement_problems
from .passes.sharding.mesh import RankShare
from .passes.splitting.check import problems as stage_problems
from .passes.splitting.stage import StageShare
from .passes.streaming.budget import Budget
from .stages import stage

log = logger(__name__)

set_logs_from_environment()


@dataclass
class Prepared:
    """A captured model, and the passes that are to run on it."""

    state: GraphState
    sources: dict[str, WeightRef]
    passes: list[Pass]
    checks: list[Check]
    capture_seconds: float
    reads: Reads | None
    kept: int
    captures: list[Reads]
    """Of captures of other lengths as well."""


def prepare(model: nn.Module, call: CallSpec, options: Options, rank: int | None = None) -> Prepared:
    """Capture a model and plan its pipeline; nothing has run yet. `rank`: of the mesh; None: this process's own."""
    at = own_rank(options) if rank is None else rank
    refuse_subclasses(model)
    others = registered_passes() if options.pipeline else {}
    plan(options.pipeline, built_in(), others)  # a wrong string is refused before the capture, which takes seconds
    if options.kernels == "auto" and any(p.dtype in profile(p.device).packs for p in model.parameters()):
        cpu.begin()
    started = time.perf_counter()
    with stage("capturing the model"):
        captured = capture(model, call)
    seconds = time.perf_counter() - started
    sources: dict[str, WeightRef] = {}  # of every capture: passes may go on with another one
    state = _state(captured, options, sources, at)
    passes = plan(options.pipeline, built_in(), others, lambda step: step.is_wanted(state, options))
    checks: list[Check] = [] if options.verify_each == "none" else [check_level]

    captures = [captured.reads] if captured.reads is not None else []

    def other_length(tokens: int, before: str) -> GraphState:
        other = capture(model, call.with_length(tokens))
        if other.reads is not None:
            captures.append(other.reads)
        there = _state(other, options, sources, at)
        run_passes(there, list(itertools.takewhile(lambda step: step.slug != before, passes)), checks)
        return there

    state.other_length = other_length
    return Prepared(state, sources, passes, checks, seconds, captured.reads, captured.kept, captures)


def convert(
    model: nn.Module,
    call: CallSpec,
    options: Options,
    checks: Sequence[Check] = (),
    user_checks: Sequence[Check] = (),
    instruments: Sequence[Instrument] = (),
    rank: int | None = None,
) -> Converted:
    """Turn a decoder into a tree-verification graph, or raise `Unsupported`. `user_checks` follow users' passes.

    `rank`: of the mesh, whose graph is wanted; None: this process's own.
    """
    prepared = prepare(model, call, options, rank)
    state = prepared.state
    check_complete(prepared.passes)
    with stage("proving and rewriting"):
        history = run_passes(
            state, prepared.passes, [*prepared.checks, *checks], user_checks, _watching(options, instruments)
        )
    state.other_length = None
    proved = {source for name in state.proved_from & set(state.weights) for source in state.weights[name].sources}
    sources = {name: prepared.sources[name] for name in sorted(state.weights.sources)}
    _drop_unused_inputs(state)
    max_context, limits = _context(state.limits, options.max_context)
    return Converted(
        state,
        sources,
        sorted(proved),
        history,
        prepared.capture_seconds,
        max_context,
        limits,
        input_vocab(state) if state.whole is None else state.whole.input_vocab,
        prepared.reads,
        prepared.kept,
        Traced.of(reads.traced for reads in prepared.captures),
    )


def _watching(options: Options, instruments: Sequence[Instrument]) -> list[Instrument]:
    """The instruments of every conversion, and those asked for; one of them may be a reproducer of its own."""
    own = any(isinstance(i, ReproducerWriter) for i in instruments)
    return [*always(), *([] if own else [ReproducerWriter(options)]), *instruments]


def check_complete(passes: Sequence[Pass]) -> None:
    """A program is made by every pass that is part of the proof."""
    missing = next((p for p in built_in() if not p.optional and p not in passes), None)
    if missing is not None:
        raise InvalidPipeline(
            got=f"a pipeline without {missing.name!r}",
            expected="every pass that is not optional",
            fix="Only `treespec opt`, which makes no program, runs a part of the pipeline.",
        )


def _state(captured: Capture, options: Options, sources: dict[str, WeightRef], rank: int) -> GraphState:
    """The state of a captured graph; its weights are added to `sources`, from which they are read."""
    made = {name: as_expression(ref) for name, ref in captured.weights.items()}
    sources |= {ref.name: ref for _, refs in made.values() for ref in refs}
    weights = {name: expression for name, (expression, _) in made.items()}
    return GraphState(
        gm=captured.graph,
        tokens=captured.tokens,
        position_inputs=captured.positions,
        weights=Weights(lambda name: sources[name].tensor, weights),
        length=captured.length,
        fake_mode=captured.fake_mode,
        guards=captured.guards,
        max_context=options.max_context,
        portable=options.kernels == "aten",
        cut=_cut(options, rank),
        stage=_stage(options, rank),
        storage=options.weights,
        budget=_budget(options),
        written=list(captured.written),
        caches=[captured.weights[name].name for name in captured.written],
        model_logits=captured.logits,
        logits_given=captured.logits,
    )


def _cut(options: Options, rank: int) -> RankShare | None:
    """This rank's share of a graph for several ranks."""
    mesh = options.shape
    return None if mesh.tp == 1 else RankShare(mesh.tp, mesh.share(rank), mesh.group)


def _stage(options: Options, rank: int) -> StageShare | None:
    mesh = options.shape
    return None if mesh.pp == 1 else StageShare(mesh, rank)


def own_rank(options: Options) -> int:
    """The rank of this process; that of rank 0 where no processes were joined."""
    joined = dist.is_available() and dist.is_initialized()
    return dist.get_rank() % options.ranks if joined else 0


def _budget(options: Options) -> Budget | None:
    wanted = options.offload
    return None if wanted is None else Budget(wanted.bytes(), wanted.slots)


def check_level(state: GraphState, name: str) -> None:
    """The verifier of the graph's level, as a check for the pass manager; of its placements, once it is cut."""
    found = verify.problems(state.graph, state.level, state.outputs)
    if state.whole_groups and state.cut is not None:
        found += placement_problems(state, state.cut.ranks)
    if state.whole is not None:
        found += stage_problems(state)
    if found:
        raise PassError(pass_name=name, problem="; ".join(found))


def _drop_unused_inputs(state: GraphState) -> None:
    """Weights that were packed, and positions given by the caller, are not read any more."""
    for node in list(state.graph.nodes):
        if node.op != "placeholder" or node.users:
            continue
        if node.name in state.weights:
            state.forget(node.name)
        elif node.name in state.position_inputs:
            state.graph.erase_node(node)
    state.gm.recompile()


def _context(limits: list[Limit], asked: int | None) -> tuple[int | None, list[Limit]]:
    unique = sorted(dict.fromkeys(limits), key=lambda limit: limit.tokens)
    if asked is not None:
        unique = sorted([*unique, Limit(asked, "option max_context")], key=lambda limit: limit.tokens)
    return (unique[0].tokens if unique else None), unique
