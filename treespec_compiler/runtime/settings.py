"""What `generate` and `stream` are asked for: one frozen record, checked before anything runs or is made."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..capture.call import original_module
from ..errors import ContextOverflow, InvalidOption, InvalidPrompt
from ..options import OnUnsupported, Options
from ..program.arguments import check_start, check_tokens
from ..program.prompt import PromptLike, parse_prompt
from ..program.tree_program import TreeProgram
from ..speculation.drafts.kinds import count_drafts
from ..speculation.drafts.model import is_program
from ..speculation.drafts.tokenizers import check_tokenizers
from ..speculation.policies.auto import Auto
from ..speculation.policies.named import as_policy
from ..speculation.policies.protocol import TreePolicy
from ..speculation.sampling.samplers import ChildSampler
from ..speculation.sampling.score_processors import ScoreProcessor, as_processors
from ..speculation.sampling.settings import Sampling
from .decoding import AnyVerifier, choose

Model: TypeAlias = Any  # nn.Module or TreeProgram
DraftLike: TypeAlias = Any  # Model, Draft, name, or a list of them
Ids: TypeAlias = int | Iterable[int] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class RequestSettings:
    """What may differ from request to request. Raises InvalidOption."""

    max_new_tokens: int = 128
    temperature: float | None = 0.0
    """0 or None: the likeliest token, always."""
    top_k: int | None = None
    """0 or None: no limit."""
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    """None: the model's own, of its `generation_config`; 1.0: none."""
    logit_bias: Mapping[int, float] | None = None
    logits_processor: ScoreProcessor | Iterable[ScoreProcessor] | None = None
    """Applied to each row with that row's tokens, after the penalty; see `ScoreProcessor`."""
    seed: int | None = None
    eos_token_id: Ids = None
    """None: the model's own; `()`: none."""
    stop_ids: Iterable[int] = ()
    model_defaults: bool = True
    """Whether the model's `generation_config` says what is left open here; its end ids count in any case."""
    sampling: Sampling = field(init=False, repr=False)
    """All of the above that makes logits a distribution."""

    def __post_init__(self) -> None:
        self._set(
            max_new_tokens=_positive("max_new_tokens", self.max_new_tokens),
            eos_token_id=None if self.eos_token_id is None else id_set("eos_token_id", self.eos_token_id),
            stop_ids=id_set("stop_ids", self.stop_ids),
            sampling=Sampling(
                temperature=0.0 if self.temperature is None else self.temperature,
                top_k=None if _is_zero(self.top_k) else self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
                logit_bias=self.logit_bias,
                processors=as_processors(self.logits_processor),
                seed=self.seed,
            ),
        )

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def end_ids(self, module: Any) -> tuple[frozenset[int], frozenset[int]]:
        """End-of-sequence ids (the model's own if none were given) and stop ids."""
        eos = self.eos_token_id
        for holder in ("generation_config", "config"):
            if eos is None:
                eos = getattr(getattr(module, holder, None), "eos_token_id", None)
        return id_set("eos_token_id", eos), id_set("stop_ids", self.stop_ids)


@dataclass(frozen=True, kw_only=True, eq=False)
class Settings(RequestSettings):
    """What all requests to one model share, too: how it speculates and is compiled."""

    draft: DraftLike = None
    policy: TreePolicy | str | Sequence[int] | None = None
    verifier: AnyVerifier | None = None
    sampler: ChildSampler | str | None = None
    options: Mapping[str, Any] | Options | None = None
    on_unsupported: OnUnsupported | None = None
    tokenizer: Any = None
    draft_tokenizer: Any = None
    drafts: int = field(init=False, repr=False)
    """How many drafts there will be."""
    compiler: Options = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        drafts, policy = count_drafts(self.draft), as_policy(self.policy)
        self._set(drafts=drafts, policy=policy)
        choose(self.sampling, self.verifier, self.sampler, self.policy_for(self.sampling), drafts=drafts)
        options = Options.parse(self.options)
        fallback = options.on_unsupported if self.on_unsupported is None else self.on_unsupported
        if fallback not in ("raise", "fallback"):
            raise InvalidOption(name="on_unsupported", got=fallback, expected="'raise' or 'fallback'")
        check_tokenizers(self.tokenizer, self.draft_tokenizer)
        self._set(compiler=options, on_unsupported=fallback)

    def policy_for(self, sampling: Sampling) -> TreePolicy:
        """The shape of trees, which may depend on how the target is sampled."""
        policy = as_policy(self.policy)
        if not isinstance(policy, Auto) or sampling.plain:
            return policy
        return policy.for_sampling(self.verifier, self.sampler, sampling.temperature, sampling.seed is not None)


@dataclass(frozen=True, eq=False)
class Call(Settings):
    """One call of `generate` or `stream`. Raises InvalidPrompt as well."""

    model: Model
    input_ids: PromptLike
    attention_mask: Any = field(default=None, kw_only=True)
    """In the shape of the ids: 0 where there is padding, on the left or the right."""
    num_return_sequences: int = field(default=1, kw_only=True)
    """Samples of each prompt; `runtime.batch` makes a call of each."""
    prompt: list[int] = field(init=False, repr=False)
    device: torch.device = field(init=False, repr=False)
    """The prompt's."""
    module: nn.Module | None = field(init=False, repr=False)
    """The original module; None for a program whose module is gone."""

    def __post_init__(self) -> None:
        prompt, device = parse_prompt(self.input_ids, self.attention_mask)
        if min(prompt) < 0:
            index = next(i for i, token in enumerate(prompt) if token < 0)
            raise InvalidPrompt(got=f"the id {prompt[index]} at index {index}", expected="ids of 0 or more")
        super().__post_init__()
        self._set(prompt=prompt, device=device, module=_module(self.model))

    def check_fits(self, program: TreeProgram) -> None:
        """Raises `TokenOutOfRange`, `HiddenStart` and `ContextOverflow`."""
        check_tokens(self.prompt, program.input_vocab)
        check_start(self.prompt[:1], program.padding)
        limit = program.max_context
        if limit is not None and len(self.prompt) > limit:
            why = program.limits[0].reason
            raise ContextOverflow(position=len(self.prompt) - 1, max_context=limit, why=why)


def _module(model: object) -> nn.Module | None:
    if is_program(model):
        return model._model()  # type: ignore[attr-defined]
    found = original_module(model)  # type: ignore[arg-type]
    if not isinstance(found, nn.Module):
        expected = "an nn.Module or a TreeProgram"
        raise InvalidOption(name="model", got=type(model).__name__, expected=expected, fix="Load the model first.")
    return found


def _positive(name: str, value: Any) -> int:
    number = _index(value)
    if number is None or number < 1:
        raise InvalidOption(name=name, got=value, expected="a positive integer")
    return number


def _index(value: Any) -> int | None:
    """An integer of any library; None for what is not one, truth values included."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and (value.ndim or value.dtype is torch.bool)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _is_zero(value: object) -> bool:
    return _index(value) == 0


def id_set(name: str, ids: Any) -> frozenset[int]:
    """Token ids from one, several or None. Raises InvalidOption."""
    if ids is None:
        return frozenset()
    if isinstance(ids, Tensor):
        ids = ids.flatten().tolist()
    if (one := _index(ids)) is not None:
        return frozenset([one])
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise InvalidOption(name=name, got=ids, expected="an id or several ids")
    values = list(ids)
    found = [_index(value) for value in values]
    if None in found:
        raise InvalidOption(name=name, got=values, expected="integer ids", fix="Encode text with the tokenizer first.")
    return frozenset(index for index in found if index is not None)
