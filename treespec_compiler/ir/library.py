"""Ops and their implementations, entered into torch in one place: names, schemas, references, fakes and tags.

An op of the tree IR is `treespec::NAME`; its reference is its definition and what runs where no kernel is bound. An
implementation is an op of its own, in another namespace, with the same schema and fake: a graph says by a node's target
which one runs, and `definition` says what that node means.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .numbered import OVERLOAD, Spelling, Texts, numbered_schema
from .private_torch import OpOverload

NAMESPACE = "treespec"
COMPLIANT = (torch.Tag.pt2_compliant_tag,)
# Any strides are read, so a compiler need not copy an input into another layout first.
ANY_STRIDES = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)


@dataclass(frozen=True)
class Definition:
    """An op of the tree IR."""

    name: str
    schema: str
    fake: Callable[..., Any]
    tags: tuple[torch.Tag, ...]
    texts: Texts = field(default_factory=dict)


_LIBRARIES: dict[str, torch.library.Library] = {}  # an op lives as long as its library
_DEFINITIONS: dict[OpOverload, Definition] = {}
_MEANING: dict[OpOverload, OpOverload] = {}
"""What an op implements; of an op of the tree IR, itself."""
_NUMBERED: dict[OpOverload, tuple[OpOverload, Spelling]] = {}
"""Of ops with texts among their arguments, the overload that takes numbers."""


def define(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    tags: tuple[torch.Tag, ...] = ANY_STRIDES,
    texts: Texts | None = None,
) -> OpOverload:
    """The op `treespec::name`, for any device. `fake`: the result of fake tensors, from the same arguments.

    `texts`: of every argument that is a string, those that have a number (`ir.numbered`); none: it is never compiled.
    """
    made = Definition(name, schema, fake, tags, texts or {})
    op = _enter(NAMESPACE, made, reference)
    _DEFINITIONS[op] = _DEFINITIONS.get(op, made)
    _MEANING[op] = op
    return op


def implement(op: OpOverload, namespace: str, run: Callable[..., Any] | None, name: str = "") -> OpOverload:
    """The op `namespace::name` (by default `op`'s name), which means `op` and runs `run`.

    `run` takes what `op` takes, defaults of its schema included. None: its code is entered elsewhere, as C++ is.
    """
    made = _DEFINITIONS[op]
    return means(_enter(namespace, made, run, name or made.name), op)


def means(target: OpOverload, op: OpOverload) -> OpOverload:
    """Note that `target` implements `op`; returns `target`."""
    _MEANING[target] = op
    return target


def _enter(namespace: str, made: Definition, run: Callable[..., Any] | None, name: str = "") -> OpOverload:
    library = _LIBRARIES.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
    name = name or made.name
    library.define(name + made.schema, tags=made.tags)
    if run is not None:
        library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{namespace}::{name}", made.fake, lib=library)
    op: OpOverload = getattr(getattr(torch.ops, namespace), name).default
    if made.texts:
        _enter_numbered(library, op, made)
    return op


def _enter_numbered(library: torch.library.Library, op: OpOverload, made: Definition) -> None:
    """The overload of `op` that takes numbers: code in C++ has one of its own, for others this one calls `op`."""
    spelling = Spelling(tuple(argument.name for argument in op._schema.arguments), made.texts)
    name = f"{op._schema.name.partition('::')[2]}.{OVERLOAD}"
    library.define(name + numbered_schema(made.schema), tags=made.tags)
    library.impl(name, spelling.spelled(op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{library.ns}::{name}", spelling.spelled(made.fake), lib=library)
    _NUMBERED[op] = getattr(op.overloadpacket, OVERLOAD), spelling


def numbered(target: object, values: Mapping[str, Any]) -> tuple[OpOverload, tuple[Any, ...]] | None:
    """The overload and the arguments of the same call without texts; None: the call has no such spelling.

    `values`: arguments by name, those that are left out as the schema's default.
    """
    if not isinstance(target, OpOverload) or target not in _NUMBERED:
        return None
    overload, spelling = _NUMBERED[target]
    numbers = spelling.numbers({**optional(target), **values})
    return None if numbers is None else (overload, numbers)


def identifier(text: str) -> str:
    """A name that torch takes for an op or a namespace."""
    return re.sub(r"\W+", "_", text.lower()).strip("_")


def defined() -> dict[str, OpOverload]:
    """The ops of the tree IR by name."""
    return {made.name: op for op, made in _DEFINITIONS.items()}


def fingerprint() -> str:
    """Of the schemas of all ops of the tree IR, and the numbers of their texts: code is compiled for these alone."""
    every = sorted(f"{m.name}{m.schema} {sorted(m.texts.items())}" for m in _DEFINITIONS.values())
    return hashlib.sha256("\n".join(every).encode()).hexdigest()[:16]


def definition(target: object) -> OpOverload | None:
    """The op of the tree IR that `target` is or implements; None: another op, or no op at all."""
    return _MEANING.get(target) if isinstance(target, OpOverload) else None


def arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of a call by its name, defaults of the schema included."""
    assert isinstance(node.target, OpOverload)
    found: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            found[argument.name] = node.args[i]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def optional(op: OpOverload) -> dict[str, Any]:
    """The arguments that have a default, and that default: leaving one out and giving its default are the same."""
    return {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}


def given(op: OpOverload, values: Mapping[str, Any]) -> frozenset[str]:
    """The optional arguments that `values` give another value than their default."""
    return frozenset(name for name, default in optional(op).items() if not _same(values.get(name, default), default))


def _same(value: Any, default: Any) -> bool:
    if value is None or default is None or isinstance(value, (fx.Node, torch.Tensor, torch.SymInt)):
        return value is default
    return bool(value == default)
