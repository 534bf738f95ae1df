"""Child samplers: which tokens become the children of a node, given the draft's distribution there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

from ...errors import InvalidOption
from .chance import Chance, Row

SamplerKind: TypeAlias = Literal["top-k", "iid", "without-replacement"]
"""What a verifier may assume of the children: chosen without chance, drawn independently, drawn one after the other
among those not yet drawn."""


@runtime_checkable
class ChildSampler(Protocol):
    @property
    def kind(self) -> SamplerKind: ...

    def draw(self, q: Row, count: int, chance: Chance) -> list[int]:
        """Up to `count` tokens in the order drawn; a token drawn twice is listed twice.

        NOTE: verification relies on this order. Sorting the tokens, by id or by probability, makes it lossy.
        """
        ...


@dataclass(frozen=True)
class TopK:
    """The likeliest tokens; ties go to the lowest id. SpecInfer, section 3.1 (expansion-based construction)."""

    kind: ClassVar[SamplerKind] = "top-k"

    def draw(self, q: Row, count: int, chance: Chance) -> list[int]:
        best = (-q).argsort(kind="stable")[:count]
        found: list[int] = best[q[best] > 0].tolist()
        return found


@dataclass(frozen=True)
class IID:
    """Independent draws from q: the samples that SpecInfer's Algorithm 2 (Theorem 4.2) is about."""

    kind: ClassVar[SamplerKind] = "iid"

    def draw(self, q: Row, count: int, chance: Chance) -> list[int]:
        return chance.repeated(q, count)


@dataclass(frozen=True)
class WithoutReplacement:
    """Draws without replacement, by Gumbel top-k: no node is spent on a token twice (Sequoia, arXiv 2402.12374)."""

    kind: ClassVar[SamplerKind] = "without-replacement"

    def draw(self, q: Row, count: int, chance: Chance) -> list[int]:
        return chance.distinct(q, count)


SAMPLERS: dict[str, ChildSampler] = {s.kind: s for s in (TopK(), IID(), WithoutReplacement())}


def as_sampler(sampler: ChildSampler | str) -> ChildSampler:
    """A sampler from what `generate(sampler=...)` takes."""
    if isinstance(sampler, str) and sampler in SAMPLERS:
        return SAMPLERS[sampler]
    if isinstance(sampler, ChildSampler) and not isinstance(sampler, type):
        return sampler
    expected = f"one of {', '.join(map(repr, SAMPLERS))}, or a ChildSampler"
    raise InvalidOption(name="sampler", got=sampler, expected=expected)
