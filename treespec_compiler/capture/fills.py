"""What forward fills when it is first called and keeps: `if self.cos is None: self.cos = ...`, a mask grown on demand.

Such an attribute holds nothing but what forward itself makes of a length and of weights, so what a model computes does
not depend on whether it was filled, and for how long a text. A trace that finds it filled would be bound to that
length; it is made with the attribute as `__init__` leaves it. That forward fills it alike is looked at by running it.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import inspect
import textwrap
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..logs import logger
from .call import CallSpec, call_module
from .marks import CONTAINERS, ValueMark, tensors_of
from .unwritten import ParametersUnwritten

log = logger(__name__)

# A model is run on so many tokens at most to see what it fills an attribute with.
LONGEST_RUN = 2048
_TRIES = 4

_EMPTY = {"torch.empty(0)", "torch.zeros(0)", "torch.tensor([])", "torch.Tensor()", "torch.Tensor([])"}


class _Missing:
    """An attribute that is not there yet: forward asks with `hasattr`."""


MISSING = _Missing()


@dataclass(frozen=True)
class Fill:
    """An attribute of a module, and how it begins."""

    module: nn.Module
    name: str
    begin: Callable[[], Any]

    @property
    def table(self) -> dict[str, Any]:
        """Where the module keeps it."""
        buffers: dict[str, Any] = self.module._buffers
        return buffers if self.name in buffers else vars(self.module)

    @property
    def value(self) -> Any:
        return self.table.get(self.name, MISSING)

    @property
    def filled(self) -> bool:
        """Whether it holds something else than at the beginning."""
        now, begin = self.value, self.begin()
        if now is MISSING:  # the class's is read, if there is one
            return False
        if isinstance(now, Tensor):
            return not isinstance(begin, Tensor) or now.shape != begin.shape
        if isinstance(now, CONTAINERS):
            return bool(now)
        return now is not begin and (type(now) is not type(begin) or now != begin)


def begins(cls: type[nn.Module]) -> dict[str, Callable[[], Any]]:
    """Attributes that other methods than `__init__` set, and what they begin as; only where that is a constant."""
    if cls not in _BEGINS:
        _BEGINS[cls] = _begins(cls)
    return _BEGINS[cls]


_BEGINS: weakref.WeakKeyDictionary[type[nn.Module], dict[str, Callable[[], Any]]] = weakref.WeakKeyDictionary()


def _begins(cls: type[nn.Module]) -> dict[str, Callable[[], Any]]:
    own = [c for c in reversed(cls.__mro__) if not c.__module__.startswith("torch.") and c is not object]
    found: dict[str, Callable[[], Any]] = {}
    for base in own:
        found |= {k: _constant(v) for k, v in vars(base).items() if v is None or type(v) in (bool, int, float)}
    computed: set[str] = set()
    first = _initial_methods(own)
    for tree in first.values():
        for node in ast.walk(tree):
            for name, value in _assigned(node):
                begin = _begin(value)
                if begin is None:
                    computed.add(name)
                else:
                    found[name] = begin
    found = {k: v for k, v in found.items() if k not in computed}
    set_, used, asked = _set_elsewhere(own, {name for _, name in first})
    begun = {k: v for k, v in found.items() if k in set_ or (k in used and isinstance(v(), CONTAINERS))}
    return begun | {k: (lambda: MISSING) for k in (set_ & asked) - found.keys()}


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def _initial_methods(classes: Sequence[type]) -> dict[tuple[type, str], ast.AST]:
    """The code of every `__init__`, base classes first, and of the methods of self that they call."""
    found: dict[tuple[type, str], ast.AST] = {}
    pending = [(cls, "__init__") for cls in reversed(classes)]
    while pending:
        cls, name = pending.pop()
        method = vars(cls).get(name)
        if not isinstance(method, FunctionType) or (cls, name) in found:
            continue
        tree = _tree(method)
        if tree is None:
            continue
        found[cls, name] = tree
        called = {n.func.attr for n in ast.walk(tree) if isinstance(n, ast.Call) and _of_self(n.func)}
        pending += [(other, attr) for other in classes for attr in sorted(called)]
    return found


def _tree(method: FunctionType) -> ast.AST | None:
    """Of its source, parsed once: classes of a model have bases in common. None: there is no source."""
    if method not in _TREES:
        try:
            _TREES[method] = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, TypeError, SyntaxError):
            _TREES[method] = None
    return _TREES[method]


_TREES: weakref.WeakKeyDictionary[FunctionType, ast.AST | None] = weakref.WeakKeyDictionary()


def _of_self(value: ast.expr) -> TypeGuard[ast.Attribute]:
    return isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name) and value.value.id == "self"


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.Assign):
        pairs = [(target, node.value) for target in node.targets]
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        pairs = [(node.target, node.value)]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "register_buffer":
        named = node.args[0] if len(node.args) > 1 else None
        if isinstance(named, ast.Constant) and isinstance(named.value, str):
            yield named.value, node.args[1]
        return
    else:
        return
    for target, value in pairs:
        both = isinstance(target, (ast.Tuple, ast.List)) and isinstance(value, (ast.Tuple, ast.List))
        if both and len(target.elts) == len(value.elts):  # type: ignore[attr-defined]
            pairs += zip(target.elts, value.elts, strict=True)  # type: ignore[attr-defined]
        elif _of_self(target):
            yield target.attr, value


def _begin(value: ast.expr) -> Callable[[], Any] | None:
    text = ast.unparse(value)
    if text in _EMPTY:
        return lambda: torch.empty(0)
    if text in ("dict()", "list()", "set()"):
        return {"dict()": dict, "list()": list, "set()": set}[text]
    try:
        constant = ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError):
        return None
    if isinstance(constant, CONTAINERS):
        return type(constant) if not constant else None
    return _constant(constant)


def _set_elsewhere(classes: Sequence[type], first: set[str]) -> tuple[set[str], set[str], set[str]]:
    """Names that methods besides the `first` ones set as attributes or register, that they read, and write out."""
    set_: set[str] = set()
    used: set[str] = set()
    written: set[str] = set()
    for cls in classes:
        for name, method in vars(cls).items():
            inner = getattr(method, "__func__", getattr(method, "fget", method))
            code = getattr(inspect.unwrap(inner) if callable(inner) else inner, "__code__", None)
            if name in first or code is None:
                continue
            for whole, more in zip((set_, used, written), _names_of(code), strict=True):
                whole |= more
    return set_, used, written


@functools.lru_cache(1 << 14)  # base classes have some thousand methods, and every class of a model has them
def _names_of(code: CodeType) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """What `_set_elsewhere` looks for, of one function."""
    set_: set[str] = set()
    used: set[str] = set()
    written: set[str] = set()
    for part in _codes(code):
        texts = {c for c in part.co_consts if isinstance(c, str)}
        if _STORE in part.co_code[::2]:  # NOTE or a number that is the same: taking code apart is slow
            set_ |= {i.argval for i in dis.get_instructions(part) if i.opname == "STORE_ATTR"}
        if "register_buffer" in part.co_names:
            set_ |= texts
        used |= set(part.co_names)
        if "hasattr" in part.co_names or "getattr" in part.co_names:
            written |= texts
    return frozenset(set_), frozenset(used), frozenset(written)


_STORE = dis.opmap["STORE_ATTR"]


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def fills(model: nn.Module) -> list[Fill]:
    """Every attribute that forward may fill."""
    return [Fill(m, name, begin) for m in model.modules() for name, begin in begins(type(m)).items()]


_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[list[tuple[str, ValueMark]], list[int]]] = (
    weakref.WeakKeyDictionary()
)


def refillable(model: nn.Module, call: CallSpec) -> list[Fill]:
    """The filled attributes that forward, run on the example's tokens or more, fills again with what they hold.

    The model is as it was afterwards. Anything else, such as a mask that its user set, is no such attribute, and none
    is one where forward, with what it filled gone, would write parameters: it would scale its weights once more.
    """
    filled = [fill for fill in fills(model) if fill.filled]
    if not filled or any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return []
    values = [*((f.name, f.value) for f in filled), *model.named_parameters(), *model.named_buffers()]
    known = _KNOWN.get(model)
    if known is None or not _still(known[0], values):
        again = _refilled(model, call, filled)
        known = ([(name, ValueMark(value)) for name, value in values], [filled.index(fill) for fill in again])
        _KNOWN[model] = known
    return [filled[i] for i in known[1]]


def _still(marks: list[tuple[str, ValueMark]], values: list[tuple[str, Any]]) -> bool:
    if [name for name, _ in marks] != [name for name, _ in values]:
        return False
    return all(mark.fits(value) for (_, mark), (_, value) in zip(marks, values, strict=True))


def _refilled(model: nn.Module, call: CallSpec, filled: list[Fill]) -> list[Fill]:
    held = [fill.value for fill in filled]
    # A number that is kept beside a table is the length that it was made for.
    sizes = [v for v in held if type(v) is int] or [s for value in held for t in tensors_of(value) for s in t.shape]
    length = max((s for s in sizes if 2 <= s <= LONGEST_RUN), default=call.length)
    there = call.with_length(length)
    kept = filled
    for _ in range(_TRIES):
        with as_it_was(model), on_copies(model), unfilled(kept), torch.no_grad(), ParametersUnwritten(model):
            try:
                call_module(model, *there.args, **there.kwargs)
            except Exception as error:
                log.debug("not run with empty attributes: %s", error)
                return []
            again = [f for f in kept if f.filled and _alike(held[filled.index(f)], f.value)]
        if len(again) == len(kept):
            break
        kept = again
    else:
        return []
    return kept


def _alike(a: Any, b: Any) -> bool:
    """Whether two fillings are the same as far as both go."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dim() != b.dim() or a.dtype != b.dtype or a.device != b.device:
            return False
        both = tuple(slice(0, min(x, y)) for x, y in zip(a.shape, b.shape, strict=True))
        return torch.equal(a[both].nan_to_num(), b[both].nan_to_num())
    if isinstance(a, dict) and isinstance(b, dict):
        return all(_alike(a[k], b[k]) for k in a.keys() & b.keys())
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_alike, a, b))
    return type(a) is type(b) and bool(a == b)


@contextlib.contextmanager
def unfilled(those: Sequence[Fill]) -> Iterator[None]:
    """With these attributes as they begin."""
    held = [(fill.table, fill.name, fill.value) for fill in those]
    try:
        for fill, (table, name, _) in zip(those, held, strict=True):
            begin = fill.begin()
            if begin is MISSING:
                table.pop(name, None)
            else:
                table[name] = begin
        yield
    finally:
        for table, name, value in held:
            for other in () if value is MISSING else (table,):
                other[name] = value


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """What runs of the model set, its attributes, buffers and what plain containers hold, is set back afterwards.

    The contents of tensors are not.
    """
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = []
    containers: list[tuple[Any, Any]] = []
    for module in model.modules():
        own = vars(module)
        tables += [(own, dict(own)), (module._buffers, dict(module._buffers))]
        containers.append((module._non_persistent_buffers_set, set(module._non_persistent_buffers_set)))
        plain = [v for v in own.values() if type(v) in CONTAINERS and v is not module._non_persistent_buffers_set]
        containers += [(v, type(v)(v)) for v in plain]
    try:
        yield
    finally:
        for table, before in tables:
            _set_back(table, before)
        for container, contents in containers:
            if len(container) != len(contents) or not _same(container, contents):
                container.clear()
                container.extend(contents) if isinstance(container, list) else container.update(contents)


@contextlib.contextmanager
def on_copies(model: nn.Module) -> Iterator[None]:
    """Runs of the model write copies of its tensors that are no parameters (its own K/V caches, say): buffers,
    attributes, and what plain lists and dicts hold.
    """
    copies: dict[int, Tensor] = {}
    held: list[tuple[Any, Any, Tensor]] = []
    for module in model.modules():
        own = vars(module)
        containers = [v for v in own.values() if type(v) in (list, dict) and v is not module._parameters]
        for holder in (own, module._buffers, *containers):
            items = enumerate(holder) if isinstance(holder, list) else holder.items()
            held += [(holder, k, v) for k, v in items if isinstance(v, Tensor) and not isinstance(v, nn.Parameter)]
    try:
        for holder, key, value in held:
            holder[key] = copies.setdefault(id(value), value.detach().clone())
        yield
    finally:
        for holder, key, value in held:
            holder[key] = value


def _set_back(table: dict[str, Any], before: dict[str, Any]) -> None:
    for name in set(table.keys()) - before.keys():
        del table[name]
    for name, value in before.items():  # NOTE a scripted module's table is no dict: it has no `get`
        if name not in table or table[name] is not value:
            table[name] = value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[k] is b[k] for k in a)
    return bool(a == b) if isinstance(a, set) else all(x is y for x, y in zip(a, b, strict=True))
