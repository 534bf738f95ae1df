"""Passes that users bring: registered by a decorator, or found under the entry point group `treespec.passes`.

A registered pass is available, not active: it runs when a pipeline names it (`options={"pipeline": "default,mine"}`).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from treespec_compiler.errors import InvalidPipeline
from treespec_compiler.logs import logger

from .manager import Pass, slug
from .state import GraphState

log = logger(__name__)

GROUP = "treespec.passes"

Run = Callable[[GraphState], int]

_registered: dict[str, Pass] = {}


def register_pass(
    name: str,
    *,
    after: str | tuple[str, ...] = (),
    before: str | tuple[str, ...] = (),
    changes: bool = True,
    expects: str = "any graph at its place in the pipeline",
    promises: str = "",
) -> Callable[[Run], Run]:
    """Register a function `run(state) -> matches` as a pass.

    `after` and `before` name the passes it stands behind and in front of; without them it stands where a pipeline names
    it. With `changes=False` the pass only reads, and is held to it. `expects` and `promises` are its contract in words.
    After it runs, the rules of the graph's level and the meaning of the graph are checked.
    """

    def decorate(run: Run) -> Run:
        promise = promises or ("unchanged" if not changes else "a graph of the same level and meaning")
        _registered[slug(name)] = Pass(
            name, run, expects, promise, None, True, changes, _names(after), _names(before), True
        )
        return run

    return decorate


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def unregister_pass(name: str) -> None:
    """Forget a registered pass; nothing happens if there is none of that name."""
    _registered.pop(slug(name), None)


def registered_passes() -> dict[str, Pass]:
    """Registered passes by slug, those of installed packages included."""
    for point in entry_points(group=GROUP):
        if slug(point.name) not in _registered:
            try:
                _load(point)
            except Exception as error:
                log.warning("entry point %s (%s) gives no pass: %s", point.name, point.value, error)
    return dict(_registered)


def _load(point: EntryPoint) -> None:
    """An entry point names a decorated function, a `Pass`, or a module that registers its passes."""
    found = point.load()
    if isinstance(found, Pass):
        _registered.setdefault(slug(found.name), found)
    elif callable(found) and not any(p.run is found for p in _registered.values()):
        raise InvalidPipeline(
            got=f"{point.value} without a name",
            expected="a registered pass",
            fix="Decorate it with @register_pass(...).",
        )
