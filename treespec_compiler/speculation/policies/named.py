"""Tree policies by what a user types: `policy="auto"`, `"1,1,3"`, `"chain:4"`."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import InvalidOption
from .auto import Auto
from .best_first import BestFirst
from .equal_growth import EqualGrowth
from .fixed import FixedTree
from .protocol import TreePolicy
from .static import StaticExpansion

DEFAULT_POLICY = "auto"


def as_policy(policy: TreePolicy | str | Sequence[int] | None) -> TreePolicy:
    """A policy from what `generate(policy=...)` takes."""
    if policy is None:
        policy = DEFAULT_POLICY
    if isinstance(policy, str):
        return _parse(policy)
    if isinstance(policy, (tuple, list)):
        return StaticExpansion(tuple(policy))
    if isinstance(policy, TreePolicy) and not isinstance(policy, type):
        return policy
    expected = f"a TreePolicy, such as StaticExpansion((1, 1, 3)), or {NAMES}"
    raise InvalidOption(name="policy", got=policy, expected=expected)


NAMES = '"auto", "1,1,3", "chain:4", "best-first:12" (nodes) or "equal-growth:2,4" (width, steps)'


def _parse(text: str) -> TreePolicy:
    """A policy from its text."""
    name, _, rest = text.strip().partition(":")
    if name.replace(",", "").replace(" ", "").strip("<>").isdecimal() or not name or name[0] in "<-,0123456789":
        return StaticExpansion.parse(text)
    numbers = [int(part) for part in rest.split(",") if part.strip().isdecimal()]
    if rest and len(numbers) == rest.count(",") + 1:
        if name == "chain" and len(numbers) == 1 and numbers[0] > 0:
            return FixedTree.chain(numbers[0])
        if name == "best-first" and len(numbers) == 1:
            return BestFirst(numbers[0])
        if name == "equal-growth" and len(numbers) == 2:
            return EqualGrowth(*numbers)
    elif not rest and name == "auto":
        return Auto()
    elif not rest and name == "best-first":
        return BestFirst()
    elif not rest and name == "equal-growth":
        return EqualGrowth()
    if not rest:
        return StaticExpansion.parse(text)
    raise InvalidOption(name="policy", got=text, expected=NAMES)
