"""What an engine did and does, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..program.pages import PageCounts
from .request import Status
from .stats import Stats


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine was made, but for `waiting`, `running` and `pages`, which are of now."""

    waiting: int
    running: int
    pages: PageCounts
    steps: int
    requests: int
    finished: int
    cancelled: int
    failed: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    """Of the prompts' tokens, those whose K/V other requests had computed."""
    tokens: int
    accepted: int
    """Of the new tokens, those that a draft had guessed."""
    nodes: int
    """Tree nodes verified."""


@dataclass
class EngineCounts:
    """Of requests that are over."""

    ended: dict[Status, int] = field(default_factory=lambda: dict.fromkeys(Status, 0))
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    accepted: int = 0
    nodes: int = 0

    def add(self, stats: Stats) -> None:
        self.prompt_tokens += stats.prompt_tokens
        self.cached_tokens += stats.cached_tokens
        self.tokens += stats.tokens
        self.accepted += stats.accepted
        self.nodes += stats.nodes
