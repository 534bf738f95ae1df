"""What clients of OpenAI's API send, checked, and what it asks of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError, model_validator
from torch import Tensor

from ..errors import ContextOverflow, InvalidOption, RequestTooLarge, TreespecError

MOST_CHOICES = 128


@dataclass(eq=False)
class Refused(Exception):
    """An answer in OpenAI's shape of errors."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    kind: str = "invalid_request_error"
    headers: dict[str, str] | None = None

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


Number = Annotated[float, Field(strict=True)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: StrictBool = False


class Asked(BaseModel):
    """What both kinds of completions take. An unknown field is an error, as is one that would change the answer."""

    model_config = ConfigDict(extra="forbid")
    model: StrictStr
    temperature: Annotated[float, Field(strict=True, ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(strict=True, ge=-1)] | None = None
    min_p: Annotated[float, Field(strict=True, ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(strict=True, gt=0)] | None = None
    frequency_penalty: Annotated[float, Field(strict=True, ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(strict=True, ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(strict=True, ge=-100, le=100)]] | None = None
    max_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(strict=True, ge=0)] | None = None
    stop: StrictStr | list[StrictStr] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    priority: StrictInt = 0
    # taken, and without meaning here
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def prompt_only(self) -> bool:
        """Whether no new token is wanted."""
        return False

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def likelihoods(self) -> int | None:
        """How many likeliest tokens of each place are wanted; None: not even the token's own likelihood."""
        raise NotImplementedError

    def new_tokens(self) -> int | None:
        """At most; None: all there is room for."""
        raise NotImplementedError

    def settings(self, prompt: Sequence[int], room: int) -> dict[str, Any]:
        """Arguments of `Engine.add`, but for the seed. `room`: tokens that the engine has for the whole of it."""
        wanted = self.new_tokens()
        processors = []
        if self.frequency_penalty or self.presence_penalty:
            processors.append(CountPenalty(len(prompt), self.frequency_penalty or 0.0, self.presence_penalty or 0.0))
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return {
            "max_new_tokens": max(1, room - len(prompt)) if wanted is None else wanted,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k in (None, -1, 0) else self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": None if self.logit_bias is None else _ids(self.logit_bias),
            "logits_processor": processors,
            "stop": [text for text in stop if text],
            "priority": self.priority,
            "logprobs": self.likelihoods(),
        }


class Completion(Asked):
    prompt: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]
    logprobs: Annotated[int, Field(strict=True, ge=0, le=20)] | None = None
    echo: StrictBool | None = None
    max_tokens: Annotated[int, Field(strict=True, ge=0)] | None = None
    best_of: None = None
    suffix: None = None

    def likelihoods(self) -> int | None:
        return self.logprobs

    def new_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else max(1, self.max_tokens)

    @property
    def prompt_only(self) -> bool:
        """Whether nothing but what is known of the prompt is wanted."""
        return self.max_tokens == 0

    @model_validator(mode="after")
    def _wants_something(self) -> Completion:
        if self.prompt_only and not self.echo:
            raise Refused(400, "Invalid max_tokens: 0 is for `echo`, expected 1 or more.", param="max_tokens")
        return self

    def settings(self, prompt: Sequence[int], room: int) -> dict[str, Any]:
        scored = {"prompt_logprobs": self.logprobs} if self.echo and self.logprobs is not None else {}
        return super().settings(prompt, room) | scored


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: StrictStr


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[TextPart]
    name: StrictStr | None = None

    def plain(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class TextFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]


class ChatCompletion(Asked):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def likelihoods(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CountPenalty:
    """OpenAI's frequency and presence penalties: scores less so much for each time, and once, that an id was given."""

    def __init__(self, prompt: int, frequency: float, presence: float) -> None:
        self._prompt, self._frequency, self._presence = prompt, frequency, presence

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.bincount(ids[0, self._prompt :], minlength=scores.shape[1])[: scores.shape[1]]
        return scores - self._frequency * counts - self._presence * (counts > 0)


T = TypeVar("T", bound=Asked)


def parse(kind: type[T], body: bytes) -> T:
    """Raises `Refused`, naming the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        # where a field may be of several types, the one that was got furthest with is meant
        names, problem = max(((_place(one["loc"]), one) for one in error.errors()), key=lambda found: len(found[0]))
        if problem["type"] == "json_invalid":
            raise Refused(400, f"The body is not JSON: {problem['msg']}.") from error
        field = ".".join(names) or None
        raise Refused(400, f"Invalid {field or 'body'}: {problem['msg']}.", param=field) from error


def _place(location: Sequence[int | str]) -> list[str]:
    return [str(part) for part in location if not _is_branch(part)]


def _is_branch(part: object) -> bool:
    """Whether it names an alternative of a field's types rather than a field."""
    return isinstance(part, str) and ("[" in part or "-" in part or part in ("str", "TextPart", "int"))


def refusal(error: TreespecError, prompt: str) -> Refused:
    """What a client is told of an error of the engine's; `prompt` is the field that the prompt came in."""
    fields = {"max_new_tokens": "max_tokens", "stop_ids": "stop"}
    if isinstance(error, RequestTooLarge | ContextOverflow):
        return Refused(400, str(error), param=prompt, code="context_length_exceeded")
    if isinstance(error, InvalidOption):
        return Refused(400, str(error), param=fields.get(error.name, error.name))
    if isinstance(error, ValueError):
        return Refused(400, str(error), param=prompt)
    return Refused(500, str(error), kind="server_error")


def _ids(bias: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError as error:
        raise Refused(400, f"Invalid logit_bias: {error}.", param="logit_bias") from error
