"""The passes that treespec brings: every module of `passes/` holds one, named by its slug, and they are put in order.

A pass says behind which others it stands (`needs`, `place_after`) and in front of which (`place_before`); the order is
a topological one of these edges, so adding a pass is adding a file.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter

import treespec_compiler.passes as home
from treespec_compiler.errors import InvalidPipeline

from .manager import Pass, slug


@functools.cache
def built_in() -> tuple[Pass, ...]:
    """Every pass of `passes/`, in the order in which they run."""
    names = sorted(m.name for m in pkgutil.iter_modules(home.__path__) if not m.ispkg)
    modules = [importlib.import_module(f"{home.__name__}.{name}") for name in names]
    return tuple(in_order([module.PASS for module in modules]))


def in_order(passes: Iterable[Pass]) -> list[Pass]:
    """The passes, each behind what it needs; where nothing is said, in the order they are given."""
    known = {p.slug: p for p in passes}
    behind: dict[str, list[str]] = {name: [] for name in known}
    for name, step in known.items():
        for other in map(slug, (*step.needs, *step.place_after)):
            behind[name].append(_named(other, step, known))
        for other in map(slug, step.place_before):
            behind[_named(other, step, known)].append(name)
    try:
        return [known[name] for name in TopologicalSorter(behind).static_order()]
    except CycleError as error:
        raise InvalidPipeline(
            got=f"passes that wait for each other: {', '.join(error.args[1])}", expected="an order without cycles"
        ) from None


def _named(other: str, step: Pass, known: dict[str, Pass]) -> str:
    if other not in known:
        got = f"no pass {other!r}, which {step.name!r} names"
        raise InvalidPipeline(got=got, expected=f"one of {', '.join(known)}")
    return other
