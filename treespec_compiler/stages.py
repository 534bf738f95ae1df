"""What a conversion is doing just now, told to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Told = Callable[[str], None]
"""Called with the stage that begins or goes on; "" when the outermost one ended."""

_told: ContextVar[Told | None] = ContextVar("told", default=None)
_open: ContextVar[str] = ContextVar("open", default="")


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Work of this name; stages may lie in each other. Costs nothing where nobody watches."""
    tell = _told.get()
    if tell is None:
        yield
        return
    outer = _open.get()
    entered = _open.set(name)
    tell(name)
    try:
        yield
    finally:
        _open.reset(entered)
        tell(outer)


@contextmanager
def watched(tell: Told) -> Iterator[None]:
    """Tell of the stages of what runs meanwhile in this context."""
    before = _told.set(tell)
    try:
        yield
    finally:
        _told.reset(before)
