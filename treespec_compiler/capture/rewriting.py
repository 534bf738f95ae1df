"""Functions of a model's code that are traced with other code: without a check, with a table in a loop's place.

What the code does is the same (`checks`, `tables`); the functions have it while a trace runs, and only then.
"""

from __future__ import annotations
import __future__

import ast
import contextlib
import copy
import dis
import functools
import gc
import inspect
import operator
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from ..errors import Refusal, Unsupported
from ..logs import logger
from .checks import caught, check_at
from .context_variables import context_reads_at, explain_context
from .empty_picks import branch_at
from .listed_places import imported, listed_places
from .one_turn import turn_at
from .picked_loops import loop_at
from .regions import Stretch, regions_at
from .tables import NoTable, forget, noted, place_of, result_name, tabulated
from .truths import causal_as_truth

log = logger(__name__)


@dataclass(frozen=True)
class Rewritten:
    """A function, and the code that it is traced with."""

    function: FunctionType
    before: CodeType
    code: CodeType
    lines: tuple[int, ...]
    """Where it is another one."""
    body: ast.FunctionDef
    read: tuple[Callable[[], bool], ...] = ()
    """Whether what its tables were made with, which no guard of a trace sees, is another now."""

    @property
    def changed(self) -> bool:
        """Whether the function, or what it was rewritten with, is another one now."""
        if self.function.__code__ is not self.before:
            return True
        return any(is_another() for is_another in self.read)


def rewritten_for(
    refusal: Unsupported, known: Sequence[Rewritten], run: Callable[[int], None], length: int
) -> list[Rewritten] | None:
    """The functions of `known` and that at whose line a trace stopped, with other code; None: there is none for it.

    `run(n)` runs the model on n tokens; `length` is that of the trace.
    """
    places = _places(refusal)
    checks = bool(places) and not caught(places)
    for filename, line in places:
        function = _function_at(filename, line)
        if function is None:
            continue
        old = next((each for each in known if each.function is function), None)
        if old is not None and line in old.lines:
            continue
        body = _body(function) if old is None else copy.deepcopy(old.body)
        if body is None:
            continue
        others = [each for each in known if each is not old]
        found = _without_check(function, body, line) if checks else None
        found = found or _without_branch(function, body, line) or _with_places(function, body, line)
        read = () if old is None else old.read
        if found is None and (known_now := _without_context(function, body, line)) is not None:
            found, read = known_now[:2], (*read, *known_now[2])
        if found is None:
            explain_context(refusal, function, body, line)
            table = _with_table(function, body, line, others, run, length)
            found = _in_one_turn(function, body, line) if table is None else table[:2]
            if found is None:
                continue
            read = read if table is None else (*read, *table[2])
        before = function.__code__ if old is None else old.before
        lines = (line,) if old is None else (*old.lines, line)
        return [*others, Rewritten(function, before, found[1], lines, found[0], read)]
    return None


@contextlib.contextmanager
def rewritten(those: Sequence[Rewritten]) -> Iterator[None]:
    """With these functions having the other code."""
    held = [(each.function, each.function.__code__) for each in those]
    try:
        for each in those:
            each.function.__code__ = each.code
        yield
    finally:
        for function, code in reversed(held):
            function.__code__ = code


def _places(refusal: Unsupported) -> list[tuple[str, int]]:
    """(file, line) where a trace stopped, inner calls first, or took the number of tokens for a constant."""
    if refusal.kind not in (Refusal.CONTROL, Refusal.NO_GRAPH, Refusal.SPECIALISED):
        return []
    return [(f.filename, f.lineno) for f in reversed(list(getattr(refusal.__cause__, "real_stack", None) or []))]


def _without_check(function: FunctionType, body: ast.FunctionDef, line: int) -> tuple[ast.FunctionDef, CodeType] | None:
    found = check_at(function, body, line)
    if found is None:
        return None
    _Replaced({id(found): [ast.copy_location(ast.Pass(), found)]}).visit(body)
    code = _compiled(body, function)
    return None if code is None else (body, code)


def _without_branch(
    function: FunctionType, body: ast.FunctionDef, line: int
) -> tuple[ast.FunctionDef, CodeType] | None:
    """The function with a branch taken, or a loop gone through, that leaves everything as it is where it would not be;
    or with what is asked for as a truth value in the place of a comparison."""
    found: dict[int, Any] | None = branch_at(function, body, line) or loop_at(function, body, line)
    found = found or causal_as_truth(body, line)
    if found is None:
        return None
    _Replaced(found).visit(body)
    ast.fix_missing_locations(body)
    code = _compiled(body, function)
    return None if code is None else (body, code)


def _with_places(function: FunctionType, body: ast.FunctionDef, line: int) -> tuple[ast.FunctionDef, CodeType] | None:
    """The function with tensors of places where lists of them index."""
    found = listed_places(function, body, line)
    if found is None:
        return None
    _Replaced(found).visit(body)
    imported(body)
    code = _compiled(body, function)
    return None if code is None else (body, code)


def _in_one_turn(function: FunctionType, body: ast.FunctionDef, line: int) -> tuple[ast.FunctionDef, CodeType] | None:
    """The function with a loop over pieces of the text that is one turn where there is one piece."""
    found = turn_at(function, body, line)
    if found is None:
        return None
    _Replaced(found).visit(body)
    ast.fix_missing_locations(body)
    code = _compiled(body, function)
    return None if code is None else (body, code)


def _without_context(
    function: FunctionType, body: ast.FunctionDef, line: int
) -> tuple[ast.FunctionDef, CodeType, tuple[Callable[[], bool], ...]] | None:
    """The function with the values of context variables in the place of what reads them, and whether they are others
    now."""
    reads = context_reads_at(function, body, line)
    if reads is None:
        return None
    _Replaced(reads[0]).visit(body)
    code = _compiled(body, function)
    return None if code is None else (body, code, reads[1])


def _with_table(
    function: FunctionType,
    body: ast.FunctionDef,
    line: int,
    others: Sequence[Rewritten],
    run: Callable[[int], None],
    length: int,
) -> tuple[ast.FunctionDef, CodeType, tuple[Callable[[], bool], ...]] | None:
    """The function with a table in the place of what it computes from sizes at the line, and what is asked of it later.

    None: it is no table.
    """
    literals = [n.value for n in ast.walk(body) if isinstance(n, ast.Constant) and type(n.value) is int]
    for region in regions_at(body, line, function):
        try:
            place = place_of(region, function)
            seeing = _compiled(_placed(body, region, noted(place)), function)
            if seeing is None:
                continue
            runs: list[Any] = []
            with rewritten([*others, Rewritten(function, function.__code__, seeing, (), body)]):
                for tokens in (length, length + 2):
                    place.seen.clear()
                    run(tokens)
                    runs.append(list(place.seen))
            table = tabulated(place, runs[0], runs[1], literals)
            tree = _placed(body, region, table.statements)
            code = _compiled(tree, function)
        except NoTable:
            continue
        except Exception as error:  # the user's code may raise anything
            log.debug("%s was not run at line %s: %s", function.__qualname__, line, error)
            continue
        finally:
            forget()
        if code is not None:
            return tree, code, table.changed
    return None


def _placed(body: ast.FunctionDef, region: Stretch, instead: list[ast.stmt]) -> ast.FunctionDef:
    """A copy of the function with other statements in the place of the region's."""
    memo: dict[int, Any] = {}
    tree: ast.FunctionDef = copy.deepcopy(body, memo)
    at = memo[id(region.at)]
    for statement in instead:
        for node in ast.walk(statement):
            ast.copy_location(node, at)
    here = [] if region.at in region.body else [at]
    swaps: dict[int, Any] = {id(memo[id(s)]): [ast.copy_location(ast.Pass(), at)] for s in region.body}
    parts = {
        id(memo[id(r)]): ast.copy_location(ast.Name(result_name(region, i), ast.Load()), at)
        for i, r in enumerate(region.results)
        if id(r) in memo and not isinstance(r, ast.Name)
    }
    _Replaced(parts).visit(tree)
    _Replaced(swaps | {id(at): [*instead, *here]}).visit(tree)
    return tree


class _Replaced(ast.NodeTransformer):
    """Puts others in the place of some nodes."""

    def __init__(self, instead: Mapping[int, Any]) -> None:
        self.instead = instead

    def visit(self, node: ast.AST) -> Any:
        if id(node) in self.instead:
            return self.instead[id(node)]
        return super().generic_visit(node)


def _function_at(filename: str, line: int) -> FunctionType | None:
    """The function that holds the line of the file, of which the end of the path will do."""
    for module in list(sys.modules.values()):
        if not str(getattr(module, "__file__", None) or "").endswith(filename):
            continue
        for value in list(vars(module).values()):
            for each in (value, *(vars(value).values() if isinstance(value, type) else ())):
                function = _inner(each)
                if function is not None and _is_at(function.__code__, filename, line):
                    return function
    # NOTE of a reference whose object is gone, `isinstance` asks that object.
    inner = [f for f in gc.get_objects() if type(f) is FunctionType and _is_at(f.__code__, filename, line)]
    codes = {f.__code__ for f in inner}
    smallest = min(codes, key=lambda c: len(list(c.co_lines())), default=None)
    alike = [f for f in inner if f.__code__ is smallest]
    return alike[0] if len(alike) == 1 else None


def _inner(value: Any) -> FunctionType | None:
    """The function that something in a module or a class is, or is made of."""
    try:
        found = inspect.unwrap(value) if callable(value) else getattr(value, "__func__", None)
    except Exception:  # an object may raise anything when it is asked
        return None
    return found if isinstance(found, FunctionType) else None


def _is_at(code: CodeType, filename: str, line: int) -> bool:
    """Whether the line is of this code, and not of a function that is defined in it."""
    return _holds(code, filename, line) and not any(_holds(c, filename, line) for c in _defined(code))


def _defined(code: CodeType) -> Iterator[CodeType]:
    """The functions and classes that are defined in it, in those as well."""
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from () if each.co_name.startswith("<") else (each,)
            yield from _defined(each)


def _holds(code: CodeType, filename: str, line: int) -> bool:
    lines = [at for _, _, at in code.co_lines() if at is not None]
    return code.co_filename.endswith(filename) and bool(lines) and min(lines) <= line <= max(lines)


def _body(function: FunctionType) -> ast.FunctionDef | None:
    """The syntax of a function, at its own lines; None: it is not to be had."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    body = tree.body[0]
    if not isinstance(body, ast.FunctionDef) or any(_is_private(node) for node in ast.walk(body)):
        return None
    body.decorator_list = []
    code = _compiled(body, function)
    # NOTE the file may have been edited after it was imported.
    return body if code is not None and [*_steps(code)] == [*_steps(function.__code__)] else None


def _steps(code: CodeType) -> Iterator[tuple[Any, ...]]:
    """What the code does, one after the other, wherever it lies."""
    jumps = {*dis.hasjrel, *dis.hasjabs}
    for each in dis.get_instructions(code):
        value = each.argval
        # What is called of a name that its module imports is no method to Python, which sees no import here.
        name = "LOAD_ATTR" if each.opname == "LOAD_METHOD" else each.opname
        if isinstance(value, CodeType):
            yield name, *_steps(value)
        elif name not in ("NOP", "EXTENDED_ARG", "PUSH_NULL"):
            elsewhere = each.opcode in jumps or (isinstance(value, str) and "<locals>" in value)
            yield name, None if elsewhere else (type(value), value)


def _is_private(node: ast.AST) -> bool:
    """A name that means another one inside a class."""
    name = getattr(node, "attr", getattr(node, "id", ""))
    return isinstance(name, str) and name.startswith("__") and not name.endswith("__")


_FUTURES = [getattr(__future__, name) for name in __future__.all_feature_names]


def _compiled(body: ast.FunctionDef, function: FunctionType) -> CodeType | None:
    """The code of the function, with the same variables of the functions around it."""
    old = function.__code__
    around = ast.parse(f"def around({', '.join(old.co_freevars)}):\n    pass")
    outer = around.body[0]
    assert isinstance(outer, ast.FunctionDef)
    body = copy.deepcopy(body)
    # Variables of the functions around are named, so that they stay the same ones.
    named = [ast.parse(f"if 0:\n    {', '.join(old.co_freevars)}").body] if old.co_freevars else []
    body.body = [*(s for part in named for s in part), *body.body]
    outer.body = [body]
    ast.fix_missing_locations(around)
    flags = old.co_flags & functools.reduce(operator.or_, (f.compiler_flag for f in _FUTURES))
    whole = compile(around, old.co_filename, "exec", flags, dont_inherit=True)
    outer_code = next(c for c in whole.co_consts if isinstance(c, CodeType))
    found = [c for c in outer_code.co_consts if isinstance(c, CodeType) and c.co_name == body.name]
    if len(found) != 1 or found[0].co_freevars != old.co_freevars:
        return None
    return found[0].replace(co_qualname=old.co_qualname)
