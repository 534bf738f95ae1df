"""Tensors that a model's Python code makes from the number of tokens alone, as tables.

`for i in range(t): m[i, : i - 3] = False` would be unrolled by a trace, for one length. What such code makes
(`regions`) depends on the length alone, so it is run here: at a length that ends the context, and at every small one,
around every number in the code, and at others. Where each of them is the corner of the longest, the code is traced as a
slice of that table. From there on it is a buffer like any other, and what it means is proved by value. Where the syntax
does not show that no length is singled out (`corners`), the table ends with the last length up to which each was run.
"""

from __future__ import annotations

import ast
import builtins
import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from ..logs import logger
from .aside import Aside, kept_as, put_aside, same, tensors
from .corners import is_corner
from .place_sums import place_sum
from .reached import Unreadable, is_library
from .regions import Stretch

log = logger(__name__)

LONGEST = 1 << 14  # NOTE what is made on the way may be a square of it, whatever comes out
ELEMENTS = 1 << 22  # of a table: a mask of 2048 tokens
SECONDS = 2.0  # for the longest run of one table; as much again for lengths that nothing points to, or half of it
DENSE = 1024  # up to here there is no gap between those, where no length can be singled out
_LENGTHS = (*range(1, 20), 31, 64, 97, 130, 257, 511, 1000, 2047, 5000, 20011)
_PLAIN = (int, float, bool, str, type(None))
_DESCRIBED = (FunctionType, BuiltinFunctionType, ModuleType)
_CODE = (torch.device, torch.dtype, FunctionType, BuiltinFunctionType)

TABLES: list[dict[str, tuple[Tensor, ...]]] = []
"""What was made: by place in the code, by the name of the settings that it was made with. Traced code reads it here."""
NAMES: list[dict[tuple[Any, ...], str]] = []
"""By place in the code, names of settings."""
_SEEN: list[TablePlace] = []  # while the model runs


class NoTable(Exception):
    """What the code makes is not one table for all lengths."""


@dataclass
class Noted:
    """One run of a place: what it was given and what it made."""

    given: tuple[Any, ...]
    made: tuple[Any, ...]
    kept: tuple[dict[Any, Any], ...]
    """The containers among what it was given, themselves."""


@dataclass(frozen=True)
class Tabulated:
    """What stands in a place of the code, and what is asked to see that it still may."""

    statements: list[ast.stmt]
    changed: tuple[Callable[[], bool], ...]


@dataclass
class TablePlace:
    """A place in a model's code, and what it was seen to do when the model ran."""

    region: Stretch
    fill: FunctionType
    function: FunctionType
    """Around the place."""
    seen: list[Noted] = field(default_factory=list)

    def run(self, *given: Any) -> tuple[Any, ...]:
        """What the code at the place makes, noted."""
        made = self.fill(*given)
        kept = tuple(m.clone() if isinstance(m, Tensor) else m for m in made)
        dicts = tuple(g for g in given if isinstance(g, dict))
        self.seen.append(Noted(tuple(dict(g) if isinstance(g, dict) else g for g in given), kept, dicts))
        return made

    def fresh(self, given: Sequence[Any]) -> tuple[Any, ...]:
        """What it makes where no container holds anything of an earlier call."""
        names = self.region.inputs
        made: tuple[Any, ...] = self.fill(
            *(type(g)() if n in self.region.caches else g for n, g in zip(names, given, strict=True))
        )
        return made

    def filled(self, given: Sequence[Any]) -> list[dict[Any, Any]]:
        """What containers that are given hold then."""
        own = [type(g)() if n in self.region.caches else g for n, g in zip(self.region.inputs, given, strict=True)]
        try:
            self.fill(*own)
        except Exception:  # it was never run for this number
            return []
        return [g for g in own if isinstance(g, dict)]


def place_of(region: Stretch, function: FunctionType) -> TablePlace:
    return TablePlace(region, _function(region, function), function)


def _function(region: Stretch, function: FunctionType) -> FunctionType:
    """The region as a function of its inputs."""
    names = {text: f"_given_{i}" for i, text in enumerate(region.inputs)}
    results = ast.Tuple([_copied(r, names) for r in region.results], ast.Load())
    body = [_copied(s, names) for s in region.body]
    tree = ast.parse(f"def fill({', '.join(names.values())}):\n    pass")
    definition: Any = tree.body[0]
    definition.body = [*body, ast.Return(results)]
    scope: dict[str, Any] = dict(function.__globals__)
    scope.setdefault("__builtins__", builtins)
    # NOTE it has lines of the file, whose functions are looked for by line (`rewriting`): it is none of them.
    exec(compile(ast.fix_missing_locations(tree), f"{function.__code__.co_filename} (a table)", "exec"), scope)
    fill: FunctionType = scope["fill"]
    return fill


def _copied(node: Any, names: dict[str, str]) -> Any:
    return _Renamed(names).visit(copy.deepcopy(node))


class _Renamed(ast.NodeTransformer):
    """Inputs under other names."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.expr) and isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            name = self.names.get(ast.unparse(node))
            if name is not None:
                return ast.copy_location(ast.Name(name, ast.Load()), node)
        return super().generic_visit(node)


def noted(place: TablePlace) -> list[ast.stmt]:
    """Code that runs the place as the model does, and takes note."""
    number = len(_SEEN)
    _SEEN.append(place)
    names = "".join(f"{result_name(place.region, i)}, " for i in range(len(place.region.results)))
    run = f"_treespec_seen[{number}].run({', '.join(place.region.inputs)})"
    return ast.parse(f"from {__name__} import _SEEN as _treespec_seen\n{names}= {run}").body


def forget() -> None:
    """Let go of the places that were noted."""
    _SEEN.clear()


def result_name(region: Stretch, i: int) -> str:
    """The name that stands in for a result."""
    result = region.results[i]
    return result.id if isinstance(result, ast.Name) else f"_treespec_{region.at.lineno}_{i}"


@dataclass(frozen=True)
class Sizes:
    """The inputs that are sizes: `slopes[i] * m + offsets[i]` for input i, where m is the first of them."""

    at: tuple[int, ...]
    slopes: tuple[int, ...]
    offsets: tuple[int, ...]

    def of(self, given: Sequence[Any], m: int) -> list[Any]:
        """What was given, for m instead."""
        found = list(given)
        for i, slope, offset in zip(self.at, self.slopes, self.offsets, strict=True):
            found[i] = slope * m + offset
        return found


def tabulated(place: TablePlace, short: Sequence[Noted], long: Sequence[Noted], literals: Sequence[int]) -> Tabulated:
    """Code that reads what the place makes from tables. `short`, `long`: what was seen in two runs of the model.

    Raises `NoTable` unless it is a table.
    """
    if len(short) != len(long) or not short:
        raise NoTable
    sizes = _sizes(short, long)
    settings = _settings(place.region, short[0].given, sizes)
    found: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}
    told: dict[tuple[Any, ...], list[Any]] = {}
    shapes: list[list[tuple[int, int]]] | None = None
    functions = {id(v): v for one in short for v in one.given if isinstance(v, _DESCRIBED)}
    try:
        with put_aside(place.fill, place.function, [*functions.values()], lambda: place.fresh(short[0].given)) as aside:
            for seen, other in zip(short, long, strict=True):
                key = tuple(seen.given[i] for i in settings)
                if any(_settings(place.region, one.given, sizes) != settings for one in (seen, other)):
                    raise NoTable
                if _told(key) != _told(other.given[i] for i in settings) or told.setdefault(key, _told(key)) != _told(
                    key
                ):
                    raise NoTable  # 1 and True are the same key
                if key not in found:
                    found[key], shape = _table(place, seen, other, sizes, {*literals, *aside.numbers}, aside)
                    if shapes not in (None, shape):
                        raise NoTable
                    shapes = shape
                for one in (seen, other):
                    if not all(same(a, b) for a, b in zip(place.fresh(one.given), one.made, strict=True)):
                        raise NoTable  # what an earlier call left there is something else
    except Unreadable as error:
        raise NoTable from error
    assert shapes is not None
    number = len(TABLES)
    names = {key: str(i) for i, key in enumerate(found)}
    TABLES.append({names[key]: made for key, made in found.items()})
    NAMES.append(names)
    kept = {id(d): d for one in (*short, *long) for d in (*one.kept, *aside.kept)}
    changed = (
        *aside.changed,
        kept_as(list(kept.values()), list(found.values()), lambda n: place.filled(sizes.of(short[0].given, n))),
    )
    return Tabulated(_reading(place.region, number, sizes, settings, shapes, [*found.values()]), changed)


def _is_library(value: Any) -> bool:
    return isinstance(value, ModuleType) and is_library(value)


def _told(key: Any) -> list[Any]:
    return [(type(v), repr(v) if isinstance(v, _PLAIN) else v) for v in key]


def _sizes(short: Sequence[Noted], long: Sequence[Noted]) -> Sizes:
    a, b = short[0].given, long[0].given
    at = tuple(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if type(x) is int and x != y)
    if not at:
        raise NoTable
    step = b[at[0]] - a[at[0]]
    slopes = tuple((b[i] - a[i]) // step for i in at)
    offsets = tuple(a[i] - s * a[at[0]] for i, s in zip(at, slopes, strict=True))
    return Sizes(at, slopes, offsets)


def _settings(region: Stretch, given: Sequence[Any], sizes: Sizes) -> list[int]:
    """The inputs that are numbers, functions, and the like, besides sizes and what is kept."""
    found: list[int] = []
    for i, (name, value) in enumerate(zip(region.inputs, given, strict=True)):
        if isinstance(value, (*_PLAIN, *_CODE)):
            found += [] if i in sizes.at else [i]
        elif not (name in region.caches and isinstance(value, dict)) and not _is_library(value):
            raise NoTable
    return found


def _table(
    place: TablePlace, seen: Noted, other: Noted, sizes: Sizes, literals: set[int], aside: Aside
) -> tuple[tuple[Tensor, ...], list[list[tuple[int, int]]]]:
    """The longest tables, and the sizes of each of their dimensions, `slope * m + offset`, for m tokens."""

    def made(m: int) -> tuple[Tensor, ...]:
        aside.forget()
        results = place.fresh(sizes.of(seen.given, m))
        if not all(isinstance(r, Tensor) and type(r) is Tensor and not r.requires_grad and r.dim() for r in results):
            raise NoTable
        return results

    def look(m: int) -> None:
        results = made(m)
        for value, table, shape in zip(results, whole, shapes, strict=True):
            if [*value.shape] != [a * m + b for a, b in shape] or value.dtype != table.dtype:
                raise NoTable
            if not same(value, table[tuple(slice(0, s) for s in value.shape)]):
                raise NoTable
        if holds and (m <= 64 or not aside.cached):
            with aside.as_it_is():
                there = place.fill(*(dict(g) if isinstance(g, dict) else g for g in sizes.of(seen.given, m)))
            if not all(same(a, b) for a, b in zip(there, results, strict=True)):
                raise NoTable  # an earlier call, or the user, left something else there

    try:
        first, second = seen.given[sizes.at[0]], other.given[sizes.at[0]]
        shapes = [_shape(a, b, first, second) for a, b in zip(made(first), made(second), strict=True)]
        longest, whole = _longest(made, first)
        contents = [*aside.before, *seen.kept]
        holds = any(contents) or bool(aside.cached)
        held = {s for d in contents for t in tensors([*d.values()]) for s in t.shape}
        held |= {k for d in contents for k in d if type(k) is int}
        ints = {*literals, *(v for v in seen.given if type(v) is int)}
        numbers = {n + e for n in ints for e in (-1, 0, 1, 2)} | held
        required = sorted({m for m in (*_LENGTHS, *numbers, longest - 1, longest) if 2 <= m <= longest})
        for m in required:
            look(m)
        corner = is_corner(place.region, sizes.at, place.function.__globals__)
        each, most = _every(required, longest) if not corner else _others(required, longest), SECONDS / (1 + corner)
        began, reached = time.thread_time(), longest
        for m in each:
            if time.thread_time() - began > most:
                reached = reached if corner else m - 1
                break
            look(m)
        if reached < max(first, second):
            raise NoTable
        if reached < longest:
            log.info("%s: each length is looked at up to %d", place.function.__qualname__, reached)
            sizes_there = [tuple(slice(0, a * reached + b) for a, b in shape) for shape in shapes]
            whole = tuple(t[cut] for t, cut in zip(whole, sizes_there, strict=True))
    except NoTable:
        raise
    except Exception as error:  # code of the user's, run out of its place
        raise NoTable from error
    return tuple(t.detach().clone() for t in whole), shapes


def _others(looked_at: Sequence[int], longest: int) -> Iterator[int]:
    """Lengths that nothing points to: all of the short ones first, then some of the others."""
    yield from (m for m in range(2, min(DENSE, longest)) if m not in looked_at)
    if longest > DENSE:
        yield from sorted(random.Random(longest).sample(range(DENSE, longest), min(32, longest - DENSE)))


def _every(looked_at: Sequence[int], longest: int) -> Iterator[int]:
    """Each length that was not looked at."""
    done = set(looked_at)
    return (m for m in range(2, longest) if m not in done)


def _longest(made: Callable[[int], tuple[Tensor, ...]], first: int) -> tuple[int, tuple[Tensor, ...]]:
    """The most tokens for which it is made in SECONDS and ELEMENTS, and what is made then. `first`: some that are."""
    longest, whole = first, made(first)
    while longest < LONGEST:
        began = time.perf_counter()
        more_tokens = 2 * longest if longest >= 32 else 32
        try:
            more = made(more_tokens)
        except NoTable:
            raise
        except Exception:  # a table of the model's own ends here
            return _last(made, longest, more_tokens, whole)
        if any(t.numel() > ELEMENTS for t in more):
            break
        longest, whole = more_tokens, more
        if 4 * (time.perf_counter() - began) > SECONDS:
            break
    return longest, whole


def _last(
    made: Callable[[int], tuple[Tensor, ...]], good: int, bad: int, whole: tuple[Tensor, ...]
) -> tuple[int, tuple[Tensor, ...]]:
    """The last number of tokens from `good` on for which it is made, and what is made then; for `bad` it is not."""
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            good, whole = middle, made(middle)
        except NoTable:
            raise
        except Exception:  # the model's own code may raise anything there
            bad = middle
    return good, whole


def _shape(a: Tensor, b: Tensor, first: int, second: int) -> list[tuple[int, int]]:
    if a.dim() != b.dim():
        raise NoTable
    slopes = [(y - x) // (second - first) for x, y in zip(a.shape, b.shape, strict=True)]
    if not any(slopes):
        raise NoTable
    return [(s, x - s * first) for s, x in zip(slopes, a.shape, strict=True)]


def _reading(
    region: Stretch,
    number: int,
    sizes: Sizes,
    settings: Sequence[int],
    shapes: list[list[tuple[int, int]]],
    tables: Sequence[tuple[Tensor, ...]],
) -> list[ast.stmt]:
    """Code that reads the tables, for any number of tokens."""
    where, *others = zip((f"({region.inputs[i]})" for i in sizes.at), sizes.slopes, sizes.offsets, strict=True)
    length = where[0]
    lines = [f"from {__name__} import NAMES as _treespec_names, TABLES as _treespec_tables"]
    lines.append("import torch as _treespec_torch")
    for text, slope, offset in others:  # the trace decides it, or has a condition on the number of tokens
        lines.append(f"if {text} != {slope} * {length} + {offset}: raise RuntimeError('not the sizes of a table')")
    key = "".join(f"({region.inputs[i]})," for i in settings)
    lines.append(f"_treespec_name = _treespec_names[{number}][({key})]")
    for i, shape in enumerate(shapes):
        parts = ", ".join(_slice(length, slope, offset) for slope, offset in shape)
        steps = place_sum([made[i] for made in tables])
        if steps is None:
            read = f"_treespec_tables[{number}][_treespec_name][{i}][{parts}].clone()"
        else:  # sums of places themselves, which are known where a table's contents are not
            read = steps.text([_slice(length, slope, offset) for slope, offset in shape], [*tables[0][i].shape])
        lines.append(f"_treespec_read_{i} = {read}")
    lines += [f"{result_name(region, i)} = _treespec_read_{i}" for i in range(len(shapes))]
    return ast.parse("\n".join(lines)).body


def _slice(length: str, slope: int, offset: int) -> str:
    if not slope:
        return ":"
    times = length if slope == 1 else f"{slope} * {length}"
    return f":{times} + {offset}" if offset else f":{times}"
