"""What the code of a function is, so that another process can tell whether it has the same."""

from __future__ import annotations

import dis
import hashlib
import importlib.util
from collections.abc import Iterator
from types import CodeType
from typing import Any

_IMPORT = dis.opmap["IMPORT_NAME"]


def code_digest(code: CodeType) -> str:
    """Equal for the same source in the same place of the same file, and only for it."""
    return _digest(code).hex()


def _digest(code: CodeType) -> bytes:
    found = hashlib.sha256()
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags, code.co_firstlineno)
    for part in (code.co_filename, code.co_qualname, *names, counts):
        found.update(repr(part).encode(errors="surrogatepass") + b"\0")
    for text in (code.co_code, code.co_exceptiontable, code.co_linetable):
        found.update(len(text).to_bytes(8, "little") + text)
    for const in code.co_consts:
        found.update(_constant(const) + b"\0")
    return found.digest()


def _constant(value: Any) -> bytes:
    if isinstance(value, CodeType):
        return _digest(value)
    if isinstance(value, frozenset):  # its order is another in each process
        return b"{%s}" % b",".join(sorted(map(_constant, value)))
    if isinstance(value, tuple):
        return b"(%s)" % b",".join(map(_constant, value))
    return f"{type(value).__name__} {value!r}".encode(errors="surrogatepass")


def inner_code(code: CodeType) -> Iterator[CodeType]:
    """The code, and that of functions in it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from inner_code(const)


def names_in(code: CodeType) -> set[str]:
    """Names that code may look up: as it writes them, and its texts, with which `getattr` may."""
    texts = (text for const in code.co_consts for text in _texts(const))
    return {*code.co_names, *(text for text in texts if text.isidentifier())}


def _texts(const: Any) -> Iterator[str]:
    if isinstance(const, str):
        yield const
    elif isinstance(const, (tuple, frozenset)):
        for each in const:
            yield from _texts(each)


def imported_modules(code: CodeType, package: str) -> set[str]:
    """Full names of modules that code imports while it runs, and of what it takes from them, modules or not."""
    if _IMPORT not in code.co_code[::2]:
        return set()
    found: set[str] = set()
    before: list[Any] = [None, None]
    for step in dis.get_instructions(code):
        if step.opcode == _IMPORT:
            level, taken = before
            name = "." * level + str(step.argval) if type(level) is int else str(step.argval)
            try:
                whole = importlib.util.resolve_name(name, package)
            except ImportError:
                continue
            parts = whole.split(".")
            found |= {".".join(parts[: i + 1]) for i in range(len(parts))}
            found |= {f"{whole}.{each}" for each in (taken if isinstance(taken, tuple) else ())}
        before = [before[1], step.argval]
    return found
