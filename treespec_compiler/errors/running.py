"""What goes wrong while requests run: room, caches, logits, drafts and models of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .base import TreespecError


@dataclass(eq=False, kw_only=True)
class CacheOverflow(TreespecError, ValueError):
    """More tokens than a slot of the cache has room for."""

    slot: int
    length: int
    new: int
    capacity: int
    template: ClassVar[str] = (
        "The cache is full: slot {e.slot} holds {e.length} tokens and got {e.new} more, expected at most "
        "{e.capacity} in all (uncommitted tree nodes included). "
        "Make a larger cache, `new_cache(max_tokens={e.needed})` or more, or free the slot."
    )

    @property
    def needed(self) -> int:
        return self.length + self.new


@dataclass(eq=False, kw_only=True)
class RequestTooLarge(TreespecError, ValueError):
    """A request that an engine could not run if it had all pages for itself."""

    prompt: int
    new: int
    capacity: int
    template: ClassVar[str] = (
        "The request can never run: got a prompt of {e.prompt} tokens and {e.new} new ones, expected at most "
        "{e.capacity} together, which is all that the engine holds. Ask for fewer new tokens, or make an engine with a "
        "larger `max_tokens`."
    )


@dataclass(eq=False, kw_only=True)
class EngineClosed(TreespecError, RuntimeError):
    """A request to an engine that was closed."""

    number: int
    template: ClassVar[str] = (
        "The engine is closed: got request {e.number}, expected none after `close()`. Make another engine."
    )


@dataclass(eq=False, kw_only=True)
class OutOfPages(TreespecError, RuntimeError):
    """More pages wanted of a paged cache than are free."""

    wanted: int
    free: int
    total: int
    page_size: int
    template: ClassVar[str] = (
        "The cache is out of pages: got {e.wanted} wanted, expected at most the {e.free} free ones of {e.total} (of "
        "{e.page_size} tokens each). Free a slot, or make a larger cache, `new_cache(pages=...)`."
    )


@dataclass(eq=False, kw_only=True)
class ContextOverflow(TreespecError, ValueError):
    """More tokens than the model itself has positions for."""

    position: int
    max_context: int
    why: str = "its position table ends there"
    template: ClassVar[str] = (
        "The model's context is full: got a token at position {e.position}, expected positions below "
        "{e.max_context} ({e.why}). Shorten the prompt or generate fewer tokens."
    )


@dataclass(eq=False, kw_only=True)
class HiddenStart(TreespecError, ValueError):
    """A text begins with a token that the model hides from all others: padding in front."""

    token: int
    where: str
    template: ClassVar[str] = (
        "The text begins with padding: got token {e.token} at the start of {e.where}, which the model hides from every "
        "token, expected one that is seen. Leave the padding out; requests of other lengths need none."
    )


@dataclass(eq=False, kw_only=True)
class StaleCache(TreespecError, RuntimeError):
    """A cache of a program that was rebuilt or of another program."""

    reason: str
    template: ClassVar[str] = (
        "This cache no longer fits the program: got a cache made before {e.reason}, expected one made after. "
        "Make a new one with `program.new_cache(...)` and prefill the prompt again."
    )


@dataclass(eq=False, kw_only=True)
class InvalidLogits(TreespecError, ArithmeticError):
    """The target's logits leave no distribution to take a token from."""

    position: int
    problem: str = "NaN or infinite logits"
    template: ClassVar[str] = (
        "The target's logits are unusable: got {e.problem} after the token at position {e.position}, expected finite "
        "ones (-inf is legal for some of the ids). The request was ended; others are untouched. "
        "Check the model's weights and dtype."
    )


@dataclass(eq=False, kw_only=True)
class DraftFailed(TreespecError, RuntimeError):
    """A draft of the user's own that lets StopIteration out, which would look like the output's end."""

    draft: str
    method: str
    template: ClassVar[str] = (
        "The draft {e.draft!r} failed: got a StopIteration out of its `{e.method}`, expected a result. "
        "A `next` found nothing: give it a default, `next(items, None)`."
    )


@dataclass(eq=False, kw_only=True)
class ModelFailed(TreespecError, RuntimeError):
    """A model that could not be converted and, run in the plain loop, raises an error of its own."""

    tokens: int
    problem: str
    template: ClassVar[str] = (
        "The model itself failed on {e.tokens} tokens: got {e.problem}, expected logits. Its own code raised that, run "
        "without treespec: are all ids in its vocabulary, and is its context long enough?"
    )


@dataclass(eq=False, kw_only=True)
class RanksDiffer(TreespecError, ValueError):
    """The ranks of a mesh were not called with the same."""

    rank: int
    names: Sequence[str]
    """What is another there than on rank `first`."""
    first: int = 0
    template: ClassVar[str] = (
        "Ranks differ: got another {e.listed} on rank {e.rank} than on rank {e.first}, expected the same on all. "
        "Call the same functions with the same arguments, and load the same weights, on every rank."
    )

    @property
    def listed(self) -> str:
        return ", ".join(self.names)


@dataclass(eq=False, kw_only=True)
class RankFailed(TreespecError, RuntimeError):
    """What every rank of a mesh had to do first failed on one of them: reading its model, say."""

    rank: int
    problem: str
    template: ClassVar[str] = (
        "Rank {e.rank} failed: got {e.problem}, expected all ranks to be ready. "
        "Mend it there, and start all ranks again."
    )


@dataclass(eq=False, kw_only=True)
class RankLost(TreespecError, RuntimeError):
    """A rank of a mesh ended, or did not answer in time."""

    rank: int
    """The one that noticed."""
    size: int
    step: int
    """Calls that it had run with the others by then."""
    exit_code: ClassVar[int] = 3
    template: ClassVar[str] = (
        "A rank was lost: got no answer from another one on rank {e.rank} of {e.size} after {e.step} calls, expected "
        "all of them. Look for what ended it (memory, a signal) in its own output, and start all ranks again."
    )


@dataclass(eq=False, kw_only=True)
class WeightsUnreadable(TreespecError, OSError):
    """A file of streamed weights that could not be read."""

    path: str
    offset: int
    problem: str
    template: ClassVar[str] = (
        "Streamed weights cannot be read: got {e.problem} at byte {e.offset} of {e.path}, expected a layer's weights. "
        "The request was ended. Is the disk still there? A new program writes the files again."
    )


@dataclass(eq=False, kw_only=True)
class NoRoomForWeights(TreespecError, OSError):
    """A disk without room for the weights that are to be streamed from it."""

    folder: str
    needed: int
    free: int
    template: ClassVar[str] = (
        "The weights do not fit on the disk: got {e.free:,} free bytes at {e.folder}, expected {e.needed:,}. "
        "Name a `dir` of option offload on another disk, or make room; no half file is left."
    )
