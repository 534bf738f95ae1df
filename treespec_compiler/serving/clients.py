"""Clients of a server of OpenAI's API that measure how long they wait."""

from __future__ import annotations

import http.client
import itertools
import json
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

PERCENTILES = (50, 95, 99)
TIMEOUT = 600.0


@dataclass(frozen=True)
class Endpoint:
    """Where it is: a URL that ends in /v1, and the key it asks for."""

    url: str
    key: str | None = None

    def connect(self) -> tuple[http.client.HTTPConnection, str]:
        """A connection, and what paths begin with."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname or "localhost", parts.port, timeout=TIMEOUT), parts.path.rstrip("/")

    @property
    def headers(self) -> dict[str, str]:
        key = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        return {"Content-Type": "application/json", **key}

    def models(self) -> list[str]:
        """What it serves. Raises OSError where nobody listens, ValueError where no such server answers."""
        connection, path = self.connect()
        try:
            connection.request("GET", f"{path}/models", headers=self.headers)
            answer = connection.getresponse()
            body = answer.read().decode(errors="replace")
            if answer.status != 200:
                raise ValueError(f"status {answer.status}: {body[:200]}")
            return [str(one["id"]) for one in json.loads(body)["data"]]
        except (http.client.HTTPException, KeyError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()


@dataclass(frozen=True)
class Answered:
    """One request. Seconds from when it was sent."""

    first: float = math.nan
    """Until the first piece of text."""
    whole: float = math.nan
    tokens: int = 0
    accepted: int = 0
    """Of them, guessed by a draft."""
    problem: str = ""


@dataclass(frozen=True)
class Measurement:
    """So many clients at once, each of which sends its next request when the last one is answered."""

    clients: int
    seconds: float
    answers: Sequence[Answered]

    def report(self) -> dict[str, Any]:
        good = [one for one in self.answers if not one.problem]
        tokens = sum(one.tokens for one in good)
        each = [(one.whole - one.first) / (one.tokens - 1) for one in good if one.tokens > 1]
        return {
            "clients": self.clients,
            "requests": len(self.answers),
            "failed": len(self.answers) - len(good),
            "problems": sorted({one.problem for one in self.answers if one.problem}),
            "seconds": self.seconds,
            "tokens": tokens,
            "accepted_tokens": sum(one.accepted for one in good),
            "tokens_per_second": tokens / self.seconds,
            "requests_per_second": len(good) / self.seconds,
            "latency_seconds": percentiles([one.whole for one in good]),
            "first_token_seconds": percentiles([one.first for one in good]),
            "token_seconds": percentiles(each),
        }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Of the values, those that so many percent are not above; None of none."""
    if not values:
        return None
    ordered = sorted(values)
    return {f"p{p}": ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)] for p in PERCENTILES}


def ask(server: Endpoint, model: str, prompt: str, max_tokens: int) -> Answered:
    """A completion, greedy, as a stream."""
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    connection, path = server.connect()
    began, first, usage = perf_counter(), math.nan, dict[str, Any]()
    try:
        connection.request("POST", f"{path}/completions", json.dumps(body), server.headers)
        answer = connection.getresponse()
        if answer.status != 200:
            return Answered(problem=f"status {answer.status}: {answer.read().decode(errors='replace')[:200]}")
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            piece = json.loads(line[len(b"data: ") :])
            if "error" in piece:
                return Answered(problem=str(piece["error"].get("message"))[:200])
            if math.isnan(first) and piece["choices"]:
                first = perf_counter() - began
            usage = piece.get("usage") or usage
        details = usage.get("completion_tokens_details") or {}
        accepted = details.get("accepted_prediction_tokens") or 0
        return Answered(first, perf_counter() - began, usage.get("completion_tokens", 0), accepted)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Answered(problem=f"{type(error).__name__}: {error}")
    finally:
        connection.close()


def measure(
    server: Endpoint,
    model: str,
    prompts: Sequence[str],
    clients: int,
    requests: int,
    max_tokens: int,
    done: Callable[[], None] = lambda: None,
) -> Measurement:
    """`requests` in all, of prompts in turn. Each is numbered at its beginning, so that no prompt is known before."""
    numbers, lock, answers = itertools.count(), threading.Lock(), list[Answered]()

    def client() -> None:
        while (number := next(numbers)) < requests:
            text = f"{clients}.{number} {prompts[number % len(prompts)]}"
            answered = ask(server, model, text, max_tokens)
            with lock:
                answers.append(answered)
                done()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    began = perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Measurement(clients, perf_counter() - began, answers)
