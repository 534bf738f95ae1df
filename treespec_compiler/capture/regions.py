"""What a function computes from the number of tokens alone, in Python.

A trace would run such code for one length. Here the syntax of a function is read: which statements and expressions
around a line depend on sizes, constants and each other only, what they read, and what is read of them afterwards.
That it is so is looked at again when they run (`tables`): what they are given must be numbers there, not tensors.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType

from .size_names import SizeNames, bound, is_scalar, is_target, stored


@dataclass
class Stretch:
    """Statements that depend on sizes alone, what they read and what is read of them."""

    at: ast.stmt
    """The statement that a table stands in for."""
    body: list[ast.stmt]
    results: list[ast.expr]
    """Plain names, or expressions each of which a name stands in for."""
    inputs: list[str]
    """Expressions of the function around: numbers, strings, and the like."""
    caches: list[str]
    """Those of the inputs that are containers kept by length."""


def regions_at(body: ast.FunctionDef, line: int, function: FunctionType) -> Iterator[Stretch]:
    """Stretches that hold the line, larger ones first."""
    reader = SizeNames(body, function)
    for block, at in _statements_at(body, line):
        if reader.is_static(at) and not isinstance(at, (ast.Import, ast.ImportFrom)):
            found = _whole(reader, block, at)
            alone = _whole(reader, block, at, alone=True)
            if found is not None and alone is not None:
                yield found  # what is made of it may read buffers
                found = alone
        elif isinstance(at, (ast.Return, ast.Assign, ast.Expr, ast.AugAssign, ast.AnnAssign)):
            found = _within(reader, block, at, line)
        else:
            continue
        if found is not None:
            yield found


def _statements_at(body: ast.FunctionDef, line: int) -> Iterator[tuple[list[ast.stmt], ast.stmt]]:
    """Statements that span the line with the blocks that they are in, outer ones first."""
    pending: list[ast.AST] = [body]
    while pending:
        for block in _blocks(pending.pop()):
            for statement in block:
                if statement.lineno <= line <= (statement.end_lineno or statement.lineno):
                    if not isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                        yield block, statement
                        pending.append(statement)


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
            yield block
    for handler in getattr(node, "handlers", ()):
        yield handler.body


def _whole(reader: SizeNames, block: list[ast.stmt], at: ast.stmt, alone: bool = False) -> Stretch | None:
    """The statement, what makes the things that it fills, and, unless `alone`, what is made of them afterwards."""
    place = block.index(at)
    before = _needed(reader, block[:place], [at])
    if before is None:
        return None
    own = [*before, at]
    for later in () if alone else block[place + 1 :]:
        names = _names_of(reader, own)
        if not _mentions(later) & names:
            continue
        if isinstance(later, ast.Return) or not reader.is_static(later):
            break
        own.append(later)
    return _region(reader, at, own, block, alone=alone)


def _within(reader: SizeNames, block: list[ast.stmt], at: ast.stmt, line: int) -> Stretch | None:
    """The parts of one statement that depend on sizes alone."""
    parts = [p for p in _largest(reader, at) if not isinstance(p, (ast.Name, ast.Constant)) and _makes(p)]
    if not any(p.lineno <= line <= (p.end_lineno or p.lineno) for p in parts):
        return None
    before = _needed(reader, block[: block.index(at)], parts)
    return None if before is None else _region(reader, at, before, block, parts)


def _makes(part: ast.expr) -> bool:
    """Whether the expression makes something, rather than read a size."""
    return any(isinstance(n, (ast.Call, ast.ListComp, ast.GeneratorExp)) for n in ast.walk(part)) and not is_scalar(
        part
    )


def _needed(reader: SizeNames, before: Sequence[ast.stmt], of: Sequence[ast.AST]) -> list[ast.stmt] | None:
    """Those statements that make what `of` reads; None where others have to do with it too."""
    targets = {n for s in of if isinstance(s, ast.For) for n in bound(s.target)}
    own = set().union(*(stored(n) for n in of)) - targets
    wanted = (set().union(*(_mentions(n) for n in of)) & reader.made) | own
    found: list[ast.stmt] = []
    for statement in reversed(before):
        if not _mentions(statement) & wanted:
            continue
        if not reader.is_static(statement):
            return None
        if is_scalar(getattr(statement, "value", None) or statement) and not stored(statement) & (wanted & own):
            continue  # a size, which is given
        found.insert(0, statement)
        wanted |= _mentions(statement) & reader.made
    return found


def _region(
    reader: SizeNames,
    at: ast.stmt,
    own: list[ast.stmt],
    block: list[ast.stmt],
    parts: Sequence[ast.expr] = (),
    alone: bool = False,
) -> Stretch | None:
    inside = {id(n) for s in own for n in ast.walk(s)}
    names = _names_of(reader, own)
    places = [n for n in ast.walk(reader.body) if id(n) not in inside and _text(n) in names and not is_target(n)]
    if any(getattr(n, "lineno", 0) < own[0].lineno for n in places) if own else False:
        return None  # something else had to do with it before
    read = [n for n in places if isinstance(getattr(n, "ctx", None), ast.Load) and not reader.set_again(n, at, own)]
    results: list[ast.expr] = list(parts)
    if not parts:
        static = [p for s in reader.after(at) if s not in own for p in _largest(reader, s)]
        holding = [p for p in static if {id(n) for n in ast.walk(p)} & {id(n) for n in read}]
        covered = {id(n) for p in holding for n in ast.walk(p)}
        more = any(not isinstance(p, ast.Name) for p in holding) and not alone
        if more and all(id(n) in covered for n in read):
            results = holding
        else:
            results = [ast.Name(t, ast.Load()) for t in dict.fromkeys(_text(n) for n in read)]
            if any("." in r.id for r in results if isinstance(r, ast.Name)):
                return None
    elif any(id(n) not in {id(m) for p in parts for m in ast.walk(p)} for n in read):
        return None
    if not results:
        return None
    inputs, caches = reader.inputs([*own, *(r for r in results if not isinstance(r, ast.Name))], _stored_all(own))
    changed = (
        set().union(*(stored(s) for s in block[block.index(own[0]) :] if s not in own))
        if own and own[0] in block
        else set()
    )
    if (
        not parts
        and changed & {t.split(".")[0].split("[")[0] for t in inputs}
        and not all(isinstance(r, ast.Name) for r in results)
    ):
        return None
    return Stretch(at, own, results, inputs, caches)


def _names_of(reader: SizeNames, own: Sequence[ast.stmt]) -> set[str]:
    """What the statements store: names, and containers kept by length."""
    return _stored_all(own) | {t for s in own for t in reader.caches_in(s)}


def _stored_all(own: Sequence[ast.stmt]) -> set[str]:
    return set().union(*(stored(s) for s in own)) if own else set()


def _mentions(node: ast.AST) -> set[str]:
    return (
        {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        | stored(node)
        | {_text(n) for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    )


def _text(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""


def _largest(reader: SizeNames, node: ast.AST) -> Iterator[ast.expr]:
    """The largest expressions in a statement that depend on sizes alone."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
        return
    if isinstance(node, ast.expr) and not isinstance(node, (ast.Starred, ast.Slice)) and not is_target(node):
        if reader.is_static(node):
            yield node
            return
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.comprehension, ast.keyword)) or isinstance(child, ast.keyword):
            yield from _largest(reader, child)
