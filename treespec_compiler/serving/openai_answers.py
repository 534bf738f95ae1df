"""Requests of an engine as OpenAI's API shows them: whole, or in pieces as they come."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..runtime.generation import Step
from ..runtime.likelihood import TokenLikelihood
from ..runtime.request import Output, Request

REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}


@dataclass
class Answer:
    """One answer with all of its choices: the parts that all of its pieces have in common."""

    model: str
    chat: bool
    decode: Any
    """A tokenizer's, of one token."""
    choices: int = 1
    """Of each prompt."""
    echoed: Sequence[str] = ()
    """Texts of the prompts, where they are to come first in the answer."""
    prompt_only: bool = False
    """Whether what comes after the prompt is left out."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, piece: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if piece else "chat.completion") if self.chat else "text_completion"
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model}

    def whole(self, requests: Sequence[Request]) -> dict[str, Any]:
        choices = []
        for index, request in enumerate(requests):
            output = request.output
            choice: dict[str, Any] = {"index": index, "finish_reason": self._reason(request)}
            choice["logprobs"] = self.likelihoods(index, request, output, 0)
            if self.chat:
                choice["message"] = {"role": "assistant", "content": output.text, "refusal": None}
            else:
                choice["text"] = self._echo(index) + ("" if self.prompt_only else output.text)
            choices.append(choice)
        return {**self.head(False), "choices": choices, "usage": self._usage(requests)}

    def first(self, index: int) -> dict[str, Any]:
        """The piece before the first one of a choice of a chat: whose turn it is."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**self.head(True), "choices": [choice]}

    def piece(self, index: int, request: Request, step: Step, offset: int) -> dict[str, Any]:
        """`offset`: characters of the pieces before."""
        choice: dict[str, Any] = {"index": index, "logprobs": self.likelihoods(index, request, step, offset)}
        choice["finish_reason"] = self._reason(request) if request.done else None
        if self.chat:
            choice["delta"] = {"content": step.text}
        else:
            echo = self._echo(index) if step.tree is None else ""  # with the first token
            choice["text"] = echo + ("" if self.prompt_only else step.text)
        return {**self.head(True), "choices": [choice]}

    def last(self, index: int, request: Request) -> dict[str, Any]:
        """A piece without text, where the end was not known with the last step."""
        choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": self._reason(request)}
        choice["delta" if self.chat else "text"] = {} if self.chat else ""
        return {**self.head(True), "choices": [choice]}

    def counted(self, requests: Sequence[Request]) -> dict[str, Any]:
        return {**self.head(True), "choices": [], "usage": self._usage(requests)}

    def _echo(self, index: int) -> str:
        return self.echoed[index // self.choices] if self.echoed else ""

    def likelihoods(self, index: int, request: Request, given: Output | Step, offset: int) -> dict[str, Any] | None:
        """Of a whole output or of a step's part of it, which begins after `offset` characters."""
        if self.chat:
            content = []
            if not given.likelihoods:
                return None
            for one in given.likelihoods:
                top = [self._chat_token(token, logprob) for token, logprob in one.top]
                content.append(self._chat_token(one.token, one.logprob) | {"top_logprobs": top})
            return {"content": content, "refusal": None}
        parts = []
        if given.prompt_likelihoods:
            parts.append(self._texts(request.prompt, given.prompt_likelihoods, offset))
            offset += len(self._echo(index))
        if given.likelihoods and not self.prompt_only:
            parts.append(self._texts([one.token for one in given.likelihoods], given.likelihoods, offset))
        return {name: [value for part in parts for value in part[name]] for name in parts[0]} if parts else None

    def _texts(self, tokens: Sequence[int], found: Sequence[TokenLikelihood | None], offset: int) -> dict[str, Any]:
        texts, offsets, tops = [self.decode(token) for token in tokens], list[int](), list[Any]()
        for text, one in zip(texts, found, strict=True):
            offsets.append(offset)
            offset += len(text)
            # the likelier of two tokens of one text, such as halves of characters
            top = None if one is None else {self.decode(token): _finite(value) for token, value in reversed(one.top)}
            tops.append(top)
        logprobs = [None if one is None else _finite(one.logprob) for one in found]
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _chat_token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.decode(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}

    def _usage(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Tokens; a prompt counts once, whatever the number of its choices."""
        prompt = sum(len(request.prompt) for request in requests[:: self.choices])
        new = 0 if self.prompt_only else sum(request.stats.tokens for request in requests)
        accepted = sum(request.stats.accepted for request in requests)
        guessed = sum(request.stats.nodes - request.stats.steps for request in requests)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": max(0, guessed - accepted),
            },
            "prompt_tokens_details": {"cached_tokens": sum(request.stats.cached_tokens for request in requests)},
        }

    @staticmethod
    def _reason(request: Request) -> str | None:
        reason = request.stats.finish_reason
        return None if reason is None else REASONS[reason]


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI's API gives this number instead."""
    return max(logprob, -9999.0)


def event(data: dict[str, Any] | str) -> bytes:
    """Of a stream of server-sent events."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


DONE = event("[DONE]")
