"""Of a long family of cases a run takes every twelfth: each converts a decoder, and neighbours in a list are of a kind.

A test is marked `family` where its cases are many and each costs seconds, and `rare` where it costs a quarter of a
minute and seldom fails. `TREESPEC_EVERY_CASE=1` runs them all, as whoever changes what they are about does. The first
case of a family always runs, and so does one that is asked for by its name.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import pytest

VARIABLE = "TREESPEC_EVERY_CASE"
EVERY = 12

T = TypeVar("T")


def some_of(cases: Sequence[T]) -> list[T]:
    """Of a family whose cases are made together, by a fixture."""
    return [*cases] if os.environ.get(VARIABLE) else [*cases[::EVERY]]


def sampled(items: Sequence[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Those that run and those that are left out, in their order."""
    seen = Counter[str]()
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        rare = item.get_closest_marker("rare") is not None and len(items) > 1
        if item.get_closest_marker("family") is None:
            (left if rare else kept).append(item)
            continue
        family = item.nodeid.partition("[")[0]
        (left if rare or seen[family] % EVERY else kept).append(item)
        seen[family] += 1
    return kept, left


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take those that are left out from `items`, after `-k` and `-m`: a single case is the first one."""
    if os.environ.get(VARIABLE):
        return
    kept, left = sampled(items)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept
