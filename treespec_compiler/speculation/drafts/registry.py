"""Kinds of drafts by name. Each registers itself; users' own may, or stand under the entry points `treespec.drafts`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeAlias

from ...errors import InvalidOption
from ...logs import logger
from ...options import Options
from .protocol import Draft

if TYPE_CHECKING:
    from ...program.tree_program import TreeProgram

log = logger(__name__)

GROUP = "treespec.drafts"


@dataclass(frozen=True, slots=True)
class DraftContext:
    """What a draft is made for."""

    target: TreeProgram
    options: Options
    """Of the call, for drafts that compile something."""


Factory: TypeAlias = Callable[[Any, DraftContext], Draft]
"""(what follows the colon of the name, context) -> a draft; raises InvalidOption for an argument it does not know."""


@dataclass(frozen=True, slots=True)
class DraftKind:
    factory: Factory
    usage: str
    takes: Callable[[object], bool] | None


_kinds: dict[str, DraftKind] = {}


def register_draft(
    name: str, factory: Factory, *, usage: str = "", takes: Callable[[object], bool] | None = None
) -> None:
    """Make `draft="name"` and `draft="name:argument"` mean `factory(argument, context)`.

    `context.target` is the target's `TreeProgram`; without a colon the argument is "". `usage` says in messages how the
    name is typed. With `takes`, objects for which it is true are drafts of this kind as well, and are given to the
    factory in the argument's place. The latest registration of a name counts. Raises InvalidOption.
    """
    if not isinstance(name, str) or not name or name != name.strip() or ":" in name:
        raise InvalidOption(name="register_draft", got=name, expected="a name without spaces around it and colons")
    if not callable(factory):
        raise InvalidOption(name="register_draft", got=factory, expected="a function (argument, context) -> Draft")
    _kinds[name] = DraftKind(factory, usage or f'"{name}"', takes)


def unregister_draft(name: str) -> None:
    """Forget a kind; nothing happens if there is none of that name."""
    _kinds.pop(name, None)


def kinds() -> dict[str, DraftKind]:
    """All kinds by name, those of installed packages included."""
    _load_installed()
    return dict(_kinds)


@functools.cache  # reading the metadata of all installed packages takes as long as several decoding steps
def _load_installed() -> None:
    """An entry point names a factory, or a module that registers its kinds."""
    for point in entry_points(group=GROUP):
        if point.name not in _kinds:
            try:
                found = point.load()
                if callable(found):
                    register_draft(point.name, found)
            except Exception as error:
                log.warning("entry point %s (%s) gives no draft: %s", point.name, point.value, error)


def is_named(text: str) -> bool:
    """Whether this names a kind of draft, rather than a model."""
    return text.strip().partition(":")[0] in kinds()


def check_named(text: str) -> tuple[DraftKind, str]:
    """What `name` or `name:argument` means: a kind and its argument; raises InvalidOption with the names there are."""
    name, _, argument = text.strip().partition(":")
    known = kinds()
    if name not in known:
        raise InvalidOption(
            name="draft", got=text, expected=f"a model, or {', '.join(k.usage for k in known.values())}"
        )
    return known[name], argument


def named_draft(text: str, context: DraftContext) -> Draft:
    """The draft that `name` or `name:argument` means; raises InvalidOption."""
    kind, argument = check_named(text)
    return kind.factory(argument, context)


def takes(thing: object) -> bool:
    """Whether any kind takes an object for a draft of its own."""
    return any(kind.takes is not None and kind.takes(thing) for kind in kinds().values())


def draft_of(thing: object, context: DraftContext) -> Draft | None:
    """The draft that an object is taken for, if any kind takes it."""
    for kind in kinds().values():
        if kind.takes is not None and kind.takes(thing):
            return kind.factory(thing, context)
    return None
