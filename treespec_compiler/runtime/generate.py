"""`generate` and `stream`: what a user calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from ..capture.call import original_module
from ..errors import InvalidOption, Unsupported
from ..logs import logger
from ..options import OnUnsupported, Options
from ..program.tree_program import TreeProgram, tree_program
from ..speculation.drafts.kinds import DraftContext, make_drafts
from ..speculation.drafts.model import is_program
from ..speculation.drafts.protocol import Draft
from ..speculation.drafts.tokenizers import check_tokenizers
from ..speculation.policies.auto import Auto
from ..speculation.policies.named import as_policy
from ..speculation.policies.protocol import TreePolicy
from ..speculation.sampling.samplers import ChildSampler
from ..speculation.sampling.settings import Sampling
from .decoding import AnyVerifier, appoint
from .engine import Engine
from .plain import PlainProgram
from .prompt import end_ids, parse_prompt
from .request import Ending, Request, Step
from .stats import Stats

__all__ = ["GenerationOutput", "Step", "Stream", "generate", "stream"]

log = logger(__name__)

Model = Any  # nn.Module or TreeProgram
DraftLike = Any  # Model, Draft, or a list of them

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class GenerationOutput:
    sequences: Tensor
    """[1, prompt + new] int64, on the prompt's device (CPU for a list)."""
    stats: Stats


class Stream(Iterator[Step]):
    """The steps of one generation, as they happen. `stats` and `tokens` grow with them."""

    def __init__(self, request: Request, device: torch.device) -> None:
        self.stats = request.stats
        self.tokens: list[int] = []
        self._prompt, self._device = request.prompt, device
        self._engine: Engine | None = Engine()
        self._request = request
        self._engine.add(request)

    def __next__(self) -> Step:
        engine = self._engine
        if engine is None or self.stats.finish_reason is not None:
            self.close()
            raise StopIteration
        try:
            ((_, step),) = engine.step()
            if isinstance(step, Exception):
                raise step
        except BaseException:
            self.close()
            raise
        self.tokens += step.tokens
        if self.stats.finish_reason is not None:
            self.close()
        return step

    @property
    def sequences(self) -> Tensor:
        """[1, prompt + tokens so far] int64."""
        return torch.tensor([[*self._prompt, *self.tokens]], dtype=torch.int64, device=self._device)

    def close(self) -> None:
        """End early and free the caches; exhausting the stream does it too."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.remove(self._request)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_engine", None) is not None:
            self.close()


def stream(
    model: Model,
    input_ids: Tensor | Sequence[int],
    *,
    draft: DraftLike = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    logit_bias: Mapping[int, float] | None = None,
    seed: int | None = None,
    policy: TreePolicy | str | Sequence[int] | None = None,
    verifier: AnyVerifier | None = None,
    sampler: ChildSampler | str | None = None,
    eos_token_id: int | Iterable[int] | None = None,
    stop_ids: Iterable[int] = (),
    options: Mapping[str, Any] | Options | None = None,
    on_unsupported: OnUnsupported | None = None,
    tokenizer: Any = None,
    draft_tokenizer: Any = None,
) -> Stream:
    """`generate`, a `Step` at a time: `for step in stream(...)`. Arguments are checked here, not at the first step."""
    _check_count(max_new_tokens)
    prompt, device = parse_prompt(input_ids)
    tree_policy = as_policy(policy)
    sampling = Sampling(
        temperature=0.0 if temperature is None else temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        logit_bias=logit_bias,
        seed=seed,
    )
    if isinstance(tree_policy, Auto) and not sampling.plain:
        tree_policy = tree_policy.for_sampling(verifier, sampler, sampling.temperature, seed is not None)
    judge, drawing = appoint(sampling, verifier, sampler, tree_policy, drafts=_count(draft))
    parsed = Options.parse(options)
    fallback = _on_unsupported(on_unsupported, parsed) == "fallback"
    check_tokenizers(tokenizer, draft_tokenizer)
    module = model._model() if is_program(model) else _module(model)
    eos, stop = end_ids(eos_token_id, stop_ids, module)
    ending = Ending(max_new_tokens, eos, stop)
    repeatable = not (isinstance(tree_policy, Auto) and tree_policy.remember and _count(draft))
    stats = Stats(prompt_tokens=len(prompt), seed=drawing.sampling.seed if drawing and repeatable else None)
    try:
        program = _program(model, parsed, stats)
    except Unsupported as refusal:
        if not fallback:
            raise
        log.warning("treespec runs the plain loop instead: %s", refusal)
        stats.fallback = str(refusal)
        plain = cast(TreeProgram, PlainProgram(module, parsed))  # it has of one what a request without drafts needs
        return Stream(Request(plain, prompt, ending, [], tree_policy, judge, stats, drawing), device)
    parse_prompt(prompt, vocab_size=program.input_vocab, max_context=program.max_context)
    drafts = _drafts(draft, parsed, stats, program)
    return Stream(Request(program, prompt, ending, drafts, tree_policy, judge, stats, drawing), device)


def _takes_what(function: Callable[P, Any]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """The decorated function has the arguments of `function`, which are spelled there."""

    def decorate(decorated: Callable[..., T]) -> Callable[P, T]:
        signature = inspect.signature(function)
        returns = inspect.signature(decorated).return_annotation
        decorated.__signature__ = signature.replace(return_annotation=returns)  # type: ignore[attr-defined]
        return decorated

    return decorate


@_takes_what(stream)
def generate(*args: Any, **settings: Any) -> GenerationOutput:
    """The target's own continuation of `input_ids`, sped up by what `draft` guesses right.

    With `temperature` 0 it is the greedy one; above, a sample that has exactly the target's distribution after
    `logit_bias`, `repetition_penalty`, `temperature`, `top_k`, `top_p` and `min_p` (as in transformers, in this order).
    `verifier` ("traversal", "multi-step", "recursive", "naive", "block") and `sampler` ("without-replacement", "iid",
    "top-k") say how; pairs that are not lossless are refused. `out.stats.seed` gives the same sample again; it is None
    where the trees follow earlier calls too (`policy="auto"` with a draft, and no `seed` given).

    `model` and `draft` are modules (converted on first use) or tree programs; `draft` may also be a `Draft` or a list,
    whose trees are merged, or None for no speculation. `policy` shapes the tree: `StaticExpansion((1, 1, 3))` or
    "1,1,3". Generation ends after an id of `eos_token_id` (default: the model's own; `()` for none) or `stop_ids`,
    which is kept, after `max_new_tokens`, or where the model's context ends: `out.stats.finish_reason` says which.
    `on_unsupported="fallback"` runs a model that cannot be converted in a plain loop, with a warning.
    `tokenizer` and `draft_tokenizer`, if given, are checked to mean the same by every common id.
    """
    steps = stream(*args, **settings)
    for _ in steps:
        pass
    return GenerationOutput(steps.sequences, steps.stats)


def _count(draft: DraftLike) -> int:
    return len(draft) if isinstance(draft, (list, tuple)) else draft is not None


def _check_count(max_new_tokens: object) -> None:
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
        raise InvalidOption(name="max_new_tokens", got=max_new_tokens, expected="a positive integer")


def _on_unsupported(value: str | None, options: Options) -> str:
    if value is None:
        return options.on_unsupported
    if value not in ("raise", "fallback"):
        raise InvalidOption(name="on_unsupported", got=value, expected="'raise' or 'fallback'")
    return value


def _module(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        expected = "an nn.Module or a TreeProgram"
        raise InvalidOption(name="model", got=type(model).__name__, expected=expected, fix="Load the model first.")
    return original_module(model)


def _program(model: Model, options: Options, stats: Stats) -> TreeProgram:
    if is_program(model):
        program = cast(TreeProgram, model)
        program.check_weights(contents=True)  # the caches in use may have been made by an earlier call
        return program
    began = perf_counter()
    program = tree_program(model, options=options)
    program.check()  # here, where a refusal may still mean the plain loop
    if program.compile_seconds <= perf_counter() - began:  # made just now, not by an earlier call
        stats.compile_seconds += program.compile_seconds
    return program


def _drafts(draft: DraftLike, options: Options, stats: Stats, target: TreeProgram) -> list[Draft]:
    began = perf_counter()
    drafts = make_drafts(draft, DraftContext(target, options))
    seconds = perf_counter() - began
    made = [one.compile_seconds for one in drafts if one.compile_seconds <= seconds]  # not by an earlier call
    stats.compile_seconds += sum(made)
    return drafts
