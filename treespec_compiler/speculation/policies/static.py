"""Static expansion: the same tree every step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import InvalidOption
from ..proposal import Proposal


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
