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
    draft_seconds: float
    """Drafts ran, prompts of theirs included."""
    target_seconds: float
    """The model's calls took: computing, and waiting for streamed weights."""
    weight_wait_seconds: float
    """Of these, the cores stood still for weights (option `offload`)."""
    weight_read_bytes: int
    """Of streamed weights, read since the engine was made."""

    @property
    def compute_seconds(self) -> float:
        """Of the model's calls, without waiting."""
        return max(0.0, self.target_seconds - self.weight_wait_seconds)

    @property
    def weight_rate(self) -> float:
        """Bytes a second of streamed weights, over the time in which the model or a draft ran."""
        seconds = self.draft_seconds + self.target_seconds
        return self.weight_read_bytes / seconds if seconds else 0.0


@dataclass
class StepSeconds:
    """What the steps of an engine took so far: drafts, and the model's calls."""

    draft: float = 0.0
    target: float = 0.0


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
