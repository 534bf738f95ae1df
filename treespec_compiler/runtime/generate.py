"""`generate` and `stream`: what a user calls."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

from ..capture.surroundings import not_traced
from ..errors import Unsupported
from ..logs import logger
from ..program.tree_program import TreeProgram
from .batch import BatchStream, OneByOne, calls_of
from .generation import Step
from .output import BatchOutput, GenerationOutput
from .plain import PlainProgram
from .settings import Call
from .starting import begin, drafts_of, program_of
from .stats import Stats
from .streams import Stream
from .together import Together, mesh_of

__all__ = ["BatchOutput", "GenerationOutput", "Step", "Stream", "generate", "stream"]

log = logger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def _takes(record: Callable[P, R]) -> Callable[[Callable[[list[R]], T]], Callable[P, T]]:
    """The decorated function has the arguments of `record`, which are spelled there, and is given one a request."""

    def decorate(function: Callable[[list[R]], T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **settings: P.kwargs) -> T:
            try:
                signature.bind(*args, **settings)
            except TypeError as error:
                raise TypeError(f"{function.__name__}: {error}") from None
            return function(calls_of(record, *args, **settings))

        returns = inspect.signature(function).return_annotation
        signature = inspect.signature(record).replace(return_annotation=returns)
        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate


def _stream(calls: list[Call]) -> Stream:
    return Together(calls, _here) if mesh_of(calls[0]).ranks > 1 else _here(calls)


def _here(calls: list[Call]) -> Stream:
    if len(calls) > 1:
        try:
            return BatchStream(calls)
        except Unsupported:
            if calls[0].on_unsupported != "fallback":
                raise
            return OneByOne(calls, [_alone(call) for call in calls])
    return _alone(calls[0])


def _alone(call: Call) -> Stream:
    stats = Stats(prompt_tokens=len(call.prompt))
    try:
        program = program_of(call, stats)
    except Unsupported as refusal:
        if call.on_unsupported != "fallback":
            raise
        assert call.module is not None
        log.warning("treespec runs the plain loop instead: %s", refusal)
        stats.fallback = str(refusal)
        plain = cast(TreeProgram, PlainProgram(call.module, call.compiler))
        return Stream(begin(call, plain, [], stats), call.device)  # it has of one what a request without drafts needs
    call.check_fits(program)
    return Stream(begin(call, program, drafts_of(call, stats, program), stats), call.device)


@not_traced
@_takes(Call)
def stream(calls: list[Call]) -> Stream:
    """`generate`, a `Step` at a time: `for step in stream(...)`. Arguments are checked here, not at the first step.

    With several prompts, `step.request` says whose it is.
    """
    return _stream(calls)


@not_traced
@_takes(Call)
def generate(calls: list[Call]) -> GenerationOutput:
    """The target's own continuation of `input_ids`, sped up by what `draft` guesses right.

    With `temperature` 0 it is the greedy one; above, a sample that has exactly the target's distribution after
    `logit_bias`, `repetition_penalty`, `logits_processor`, `temperature`, `top_k`, `top_p` and `min_p` (as in
    transformers, in this order). What else the model's `generation_config` says of scores is honoured, too; sampling,
    beams and the like are the call's to say, and what it says of them is named in a warning.
    `verifier` ("traversal", "multi-step", "recursive", "naive", "block") and `sampler` ("without-replacement", "iid",
    "top-k") say how; pairs that are not lossless are refused. `out.stats.seed` gives the same sample again; it is None
    where the trees follow earlier calls too (`policy="auto"` with a draft, and no `seed` given).

    `input_ids` are integers, a tensor or array [S] or [1, S], or what a tokenizer returns. Several prompts, a list of
    these or [B, S] with an `attention_mask`, are run at once and give a `BatchOutput`, whose entry i is what prompt i
    gives alone; a list as the value of a setting is one value a prompt. `num_return_sequences` samples of each prompt
    follow each other; a `seed` is that of the first of them, and the next ones count on. `model` and `draft` are
    modules (converted on first use) or tree programs; `draft` may also be a `Draft` or a list, whose trees are merged,
    or None for no speculation. `policy` shapes the tree: `StaticExpansion((1, 1, 3))` or "1,1,3". Generation ends after
    an id of `eos_token_id` (default: the model's own; `()` for none) or `stop_ids`, which is kept, after
    `max_new_tokens`, or where the model's context ends: `out.stats.finish_reason` says which.
    `on_unsupported="fallback"` runs a model that cannot be converted in a plain loop, with a warning.
    `tokenizer` and `draft_tokenizer`, if given, are checked to mean the same by every common id.
    """
    steps = _stream(calls)
    steps.exhaust()
    return steps.output()
