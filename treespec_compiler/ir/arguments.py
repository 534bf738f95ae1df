"""The arguments of ATen calls, all of them.

A captured call leaves out what equals a default, and names an argument or gives it in its place, as the model's code
did. From level "normalized" on every aten call has one form: what may stand in a place stands there, in the order of
the schema, and what can only be named is named; defaults are written out (as
`torch.fx.operator_schemas.normalize_function` does it, by the overload's own schema).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from .private_torch import OpOverload

_MISSING = object()


@dataclass(frozen=True)
class Signature:
    """Names and defaults of an overload's arguments; `_MISSING` where there is no default that can be written."""

    places: tuple[tuple[str, Any], ...]
    named: tuple[tuple[str, Any], ...]

    @functools.cached_property
    def defaults(self) -> dict[str, Any]:
        return dict((*self.places, *self.named))

    @functools.cached_property
    def at(self) -> dict[str, int]:
        return {name: i for i, (name, _) in enumerate(self.places)}


@functools.cache
def signature(target: Any) -> Signature | None:
    """Of an operator of torch or of a library; None for anything else."""
    if not isinstance(target, OpOverload):
        return None
    places: list[tuple[str, Any]] = []
    named: list[tuple[str, Any]] = []
    for argument in target._schema.arguments:
        default = argument.default_value if argument.has_default_value() else _MISSING
        # NOTE a dtype, layout or memory format that is no None comes as its number, which no call takes.
        if isinstance(default, int) and str(argument.real_type).rstrip("?") in ("ScalarType", "Layout", "MemoryFormat"):
            default = _MISSING
        (named if argument.kwarg_only else places).append((argument.name, default))
    return Signature(tuple(places), tuple(named))


def filled(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with every argument, in the one form; anything but an aten call as it is."""
    known = signature(target) if _is_aten(target) else None
    if known is None:
        return tuple(args), dict(kwargs)
    rest = dict(kwargs)
    given = list(args)
    for name, default in known.places[len(args) :]:
        value = rest.pop(name, default)
        if value is _MISSING:
            break
        given.append(value)
    names = {name: rest.pop(name, default) for name, default in known.named}
    return tuple(given), {name: value for name, value in names.items() if value is not _MISSING} | rest


def _is_aten(target: Any) -> bool:
    return isinstance(target, OpOverload) and target.namespace == "aten"


def fill(node: fx.Node) -> None:
    """Give a node its arguments in the one form."""
    if node.op == "call_function":
        node.args, node.kwargs = filled(node.target, node.args, node.kwargs)


def is_filled(node: fx.Node) -> bool:
    known = signature(node.target) if _is_aten(node.target) else None
    if known is None:
        return True
    missing = any(default is not _MISSING for _, default in known.places[len(node.args) :])
    return not missing and all(default is _MISSING or name in node.kwargs for name, default in known.named)


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument by its name in the schema, given or by default; `default` where the overload has none of the name."""
    known = signature(node.target)
    if known is None:
        return node.kwargs.get(name, default)
    at = known.at.get(name, len(node.args))
    if at < len(node.args):
        return node.args[at]
    value = node.kwargs.get(name, known.defaults.get(name, default))
    return default if value is _MISSING else value


def short(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments without those that say the default at the end: for people to read."""
    known = signature(node.target) if _is_aten(node.target) else None
    if known is None:
        return node.args, dict(node.kwargs)
    args = list(node.args)
    while args and _is_default(args[-1], known.places[len(args) - 1][1]):
        args.pop()
    defaults = dict(known.named)
    kwargs = {name: v for name, v in node.kwargs.items() if not _is_default(v, defaults.get(name, _MISSING))}
    return tuple(args), kwargs


def _is_default(value: Any, default: Any) -> bool:
    if isinstance(value, (list, tuple)) and isinstance(default, list):
        return not any(isinstance(v, fx.Node) for v in value) and list(value) == default
    return type(value) is type(default) and not isinstance(value, fx.Node) and bool(value == default)
