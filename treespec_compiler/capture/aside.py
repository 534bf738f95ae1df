"""Code that is run out of its place, with what earlier calls of its functions kept put aside.

A dict that functions fill by length, and what `functools` keeps of their results, may hold what was made in other
circumstances, or what a user put there. What is made without them is what the code says; with them it must be the same.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from .reached import Reached, Unreadable, watched


@dataclass
class Aside:
    """What the code at a place reaches besides what it is given."""

    numbers: set[int]
    kept: list[dict[Any, Any]]
    """Dicts that its functions fill."""
    cached: list[tuple[Any, str, Any]]
    """(globals, name, function) of functions whose results `functools` keeps."""
    before: list[dict[Any, Any]] = field(default_factory=list)
    """What was in those."""
    changed: tuple[Callable[[], bool], ...] = ()
    """Asked later: is anything of it another now?"""

    def forget(self) -> None:
        """Let go of what runs kept."""
        for each in self.kept:
            each.clear()

    @contextlib.contextmanager
    def as_it_is(self) -> Iterator[None]:
        """With what earlier calls kept, where the code is run without it."""
        held = [dict(d) for d in self.kept]
        for names, name, value in self.cached:
            names[name] = value
        for each, before in zip(self.kept, self.before, strict=True):
            each.update(before)
        try:
            yield
        finally:
            for names, name, value in self.cached:
                names[name] = value.__wrapped__
            for each, now in zip(self.kept, held, strict=True):
                _set_to(each, now)


@contextlib.contextmanager
def put_aside(
    fill: FunctionType, function: FunctionType, functions: Sequence[Any], run: Callable[[], Any]
) -> Iterator[Aside]:
    """Call `fill`, which `run` does, with nothing of an earlier call: what its functions kept is put aside.

    Its globals are those of `function`, or copies; `functions` are among its arguments. Raises `Unreadable` where it
    reads what cannot be watched, or changes what it reads.
    """
    code, names = fill.__code__, fill.__globals__
    kept = [d for d in Reached(code, names, functions).dicts.values() if _fills(run, d)]
    ids = frozenset(map(id, kept))
    reached = Reached(code, names, functions, ids)
    aside = Aside(reached.numbers, kept, reached.cached, [dict(d) for d in kept])
    aside.forget()
    for table, name, value in aside.cached:
        table[name] = value.__wrapped__
    try:
        yield aside
    finally:
        for table, name, value in aside.cached:
            table[name] = value
        for each, before in zip(kept, aside.before, strict=True):
            _set_to(each, before)
    if Reached(code, names, functions, ids).text != reached.text:
        raise Unreadable
    aside.changed = (watched(code, function.__globals__, functions, ids),)


def _fills(run: Callable[[], Any], kept: dict[Any, Any]) -> bool:
    """Whether a run fills a dict."""
    before = dict(kept)
    kept.clear()
    try:
        run()
        return bool(kept)
    except Exception:  # it has to be there
        return False
    finally:
        _set_to(kept, before)


def _set_to(kept: dict[Any, Any], contents: dict[Any, Any]) -> None:
    kept.clear()
    kept.update(contents)


def kept_as(
    kept: Sequence[dict[Any, Any]],
    tables: Sequence[tuple[Tensor, ...]],
    filled: Callable[[int], Sequence[dict[Any, Any]]],
) -> Callable[[], bool]:
    """A question: do containers that are filled by calls hold something else than what was there, tables, and what the
    code puts there? `filled(n)`: the contents of containers that were empty, after the code ran for n tokens.
    """
    known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
    made = [t for each in tables for t in each]

    def is_known(value: Tensor) -> bool:
        version = -1 if value.is_inference() else value._version
        there, before = known.get(id(value), (None, 0))
        if there is not None and there() is value and before == version:
            return True
        dims = [t for t in made if t.dim() == value.dim() and t.dtype == value.dtype]
        alike = [t for t in dims if all(a <= b for a, b in zip(value.shape, t.shape, strict=True))]
        corners = (t[tuple(slice(0, s) for s in value.shape)] for t in alike)
        if not any(same(value, corner) for corner in corners) and not is_filled_in(value):
            return False
        known[id(value)] = weakref.ref(value), version
        return True

    def is_filled_in(value: Tensor) -> bool:
        return any(
            same(value, made) for n in {*value.shape} for each in filled(n) for made in tensors([*each.values()])
        )

    def changed() -> bool:
        return not all(is_known(t) for each in kept for t in tensors([*each.values()]))

    for each in kept:
        for tensor in tensors([*each.values()]):
            known[id(tensor)] = weakref.ref(tensor), -1 if tensor.is_inference() else tensor._version
    return changed


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for part in value if isinstance(value, (list, tuple)) else ():
        yield from tensors(part)


def same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a is b or a == b)
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    nan = a != a if a.is_floating_point() else None
    if nan is not None and not torch.equal(nan, b != b):
        return False
    return torch.equal(a, b) if nan is None or not bool(nan.any()) else torch.equal(a[~nan], b[~nan])
