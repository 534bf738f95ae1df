"""Tree policies: how wide and how deep a draft's tree grows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ..errors import InvalidOption
from .proposal import Proposal


@dataclass(frozen=True, slots=True)
class Limits:
    """What the tree of one step may have at most: the cache and the tokens still wanted decide."""

    depth: int
    """Levels below the root; 0 means plain decoding."""
    nodes: int
    """Nodes in all, the root included."""


@runtime_checkable
class TreePolicy(Protocol):
    """Decides, level by level, how many children the newest nodes get."""

    @property
    def max_nodes(self) -> int:
        """Upper bound on the nodes of one tree, the root included; caches are sized by it."""
        ...

    @property
    def max_depth(self) -> int:
        """Upper bound on the levels below the root."""
        ...

    @property
    def needs_q(self) -> bool:
        """Whether `widths` reads `proposal.q`."""
        ...

    def widths(self, depth: int, proposal: Proposal) -> int | Sequence[int]:
        """Children of the nodes at `depth`: one number for all, or one each in node order; 0 or an empty list stops."""
        ...


@dataclass(frozen=True)
class StaticExpansion:
    """`<k1, ..., km>`: every node of level i - 1 gets its k_i likeliest children (SpecInfer, section 3.1)."""

    expansion: tuple[int, ...]

    def __post_init__(self) -> None:
        widths = self.expansion
        if isinstance(widths, int) or not isinstance(widths, Sequence) or isinstance(widths, str) or not len(widths):
            raise _bad_expansion(widths)
        if any(not isinstance(k, int) or isinstance(k, bool) or k < 1 for k in widths):
            raise _bad_expansion(widths)
        object.__setattr__(self, "expansion", tuple(widths))
        nodes, level = 1, 1
        for k in self.expansion:
            level *= k
            nodes += level
        object.__setattr__(self, "_nodes", nodes)

    @classmethod
    def parse(cls, text: str) -> StaticExpansion:
        """From what a user types: `1,1,3` or `<1,1,3>`."""
        inner = text.strip().removeprefix("<").removesuffix(">")
        if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", inner):
            raise _bad_expansion(text)
        return cls(tuple(int(k) for k in inner.split(",")))

    @property
    def max_nodes(self) -> int:
        return self._nodes  # type: ignore[attr-defined]

    @property
    def max_depth(self) -> int:
        return len(self.expansion)

    @property
    def needs_q(self) -> bool:
        return False

    def widths(self, depth: int, proposal: Proposal) -> int:
        return self.expansion[depth] if depth < len(self.expansion) else 0

    def __str__(self) -> str:
        return f"<{','.join(map(str, self.expansion))}>"


def _bad_expansion(got: object) -> InvalidOption:
    expected = "one positive integer a level, such as (1, 1, 3)"
    fix = 'Type "1,1,3" or StaticExpansion((1, 1, 3)).'
    return InvalidOption(name="expansion", got=got, expected=expected, fix=fix)


DEFAULT_POLICY = StaticExpansion((1, 1, 3))


def as_policy(policy: TreePolicy | str | Sequence[int] | None) -> TreePolicy:
    """A policy from what `generate(policy=...)` takes."""
    if policy is None:
        return DEFAULT_POLICY
    if isinstance(policy, str):
        return StaticExpansion.parse(policy)
    if isinstance(policy, (tuple, list)):
        return StaticExpansion(tuple(policy))
    if isinstance(policy, TreePolicy):
        return policy
    expected = 'a TreePolicy, such as StaticExpansion((1, 1, 3)), or its text "1,1,3"'
    raise InvalidOption(name="policy", got=policy, expected=expected)
