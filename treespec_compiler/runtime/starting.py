"""From a checked call to a generation: the program, the drafts, who judges them, and the slots it runs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import cast

from ..program.tree_program import TreeProgram, tree_program
from ..speculation.drafts.kinds import DraftContext, make_drafts
from ..speculation.drafts.model import is_program
from ..speculation.drafts.protocol import Draft
from ..speculation.policies.auto import Auto
from ..speculation.slots import KEPT, Slots
from .decoding import appoint
from .generation import Ending, Generation
from .model_defaults import with_model_defaults
from .settings import Call
from .stats import Stats
from .stopping import Text


def begin(
    call: Call,
    program: TreeProgram,
    drafts: Sequence[Draft],
    stats: Stats,
    *,
    slots: Slots = KEPT,
    text: Text | None = None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> Generation:
    """The generation that a call asks for, on slots of its own."""
    sampling = with_model_defaults(call, program.device)
    policy = call.policy_for(sampling)
    if isinstance(policy, Auto):
        policy = policy.for_target(program)
    judge, drawing = appoint(sampling, call.verifier, call.sampler, policy, drafts=call.drafts)
    repeatable = not (isinstance(policy, Auto) and policy.remember and call.drafts)
    stats.program_from_cache, memory = program.from_cache, program.memory
    stats.peak_bytes, stats.model_bytes, stats.packed_bytes = memory.peak, memory.model, memory.packed
    stats.seed = drawing.sampling.seed if drawing and repeatable else None
    ending = Ending(call.max_new_tokens, *call.end_ids(call.module))
    return Generation(
        program,
        call.prompt,
        ending,
        drafts,
        policy,
        judge,
        stats,
        drawing,
        slots=slots,
        text=text,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def program_of(call: Call, stats: Stats) -> TreeProgram:
    """The model's program; seconds of compiling it go to `stats`. Raises `Unsupported`."""
    if is_program(call.model):
        program = cast(TreeProgram, call.model)
        program.check_weights(contents=True)  # the caches in use may have been made by an earlier call
        return program
    began = perf_counter()
    program = tree_program(call.model, options=call.compiler)
    program.check()  # here, where a refusal may still mean the plain loop
    if program.compile_seconds <= perf_counter() - began:  # made just now, not by an earlier call
        stats.compile_seconds += program.compile_seconds
    return program


def drafts_of(call: Call, stats: Stats, target: TreeProgram) -> list[Draft]:
    """The call's drafts; seconds of compiling them go to `stats`."""
    began = perf_counter()
    alone = replace(call.compiler, mesh=None, offload=None)  # a draft is whole, on the rank that asks it
    drafts = make_drafts(call.draft, DraftContext(target, alone))
    seconds = perf_counter() - began
    made = [one.compile_seconds for one in drafts if one.compile_seconds <= seconds]  # not by an earlier call
    stats.compile_seconds += sum(made)
    return drafts
