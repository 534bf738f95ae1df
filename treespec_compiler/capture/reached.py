"""What code that is run out of its place reads besides its arguments: globals, and all that lies behind them.

Dynamo never sees such code (`tables`), so no guard of its knows what it read. Here it is described: the code of every
function that may be called, its defaults and closure, and the contents of each object that a name leads to. Two
descriptions are equal where nothing of it changed. What cannot be described, such as a clock, an iterator or a module
of the model's, is not read by a table.
"""

from __future__ import annotations

import builtins
import collections
import dis
import functools
import logging
import operator
import sys
import types
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .installed import INSTALLED, LIBRARIES, STDLIB

MOST_OBJECTS = 5000  # that one description goes through
MOST_NUMBERS = 1 << 20  # of a tensor or an array that a table is made of

_PURE = {
    "bisect", "builtins", "cmath", "collections", "copy", "dataclasses", "decimal", "enum", "fractions", "functools",
    "itertools", "math", "numbers", "operator", "re", "statistics", "string", "types", "typing", "warnings", "logging",
}  # fmt: skip
"""Of Python's own library. Others tell the time, draw numbers, or ask the machine."""
_ASKED = {
    "_getframe", "currentframe", "get_num_interop_threads", "get_num_threads", "get_rng_state", "getrefcount",
    "initial_seed", "is_grad_enabled", "is_inference_mode_enabled", "manual_seed", "memory_allocated", "seed",
}  # fmt: skip
"""What libraries tell of a state that no description holds, and what changes it."""
_IMPURE = {"breakpoint", "delattr", "eval", "exec", "globals", "id", "input", "locals", "open", "print", "setattr",
           "vars", "__import__"}  # fmt: skip
_PLAIN = (int, float, complex, str, bytes, bool, type(None), type(...), range, slice, torch.dtype, torch.device)
_IN_C = (BuiltinFunctionType, types.MethodWrapperType, types.WrapperDescriptorType, types.MethodDescriptorType,
         types.ClassMethodDescriptorType)  # fmt: skip
_BASES: dict[type, Callable[[Any], str]] = {each: each.__repr__ for each in (int, float, complex, str, bytes)}
_LISTS = (list, tuple, set, frozenset, collections.deque, bytearray)
_GETTERS = (operator.attrgetter, operator.itemgetter, operator.methodcaller)
_MADE_BY_PYTHON = {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__static_attributes__",
                   "__firstlineno__", "__abstractmethods__", "_abc_impl", "__dataclass_fields__",
                   "__dataclass_params__", "__match_args__"}  # fmt: skip


class Unreadable(Exception):
    """Something that a description cannot hold."""


class Reached:
    """What is reached from some code and values, at one moment."""

    def __init__(
        self, code: CodeType, names: Mapping[str, Any], values: Sequence[Any] = (), kept: Collection[int] = ()
    ) -> None:
        """`code` looks its globals up in `names`; `values`: functions that it is given; `kept`: ids of dicts that are
        filled by calls, whose contents are not described. Raises `Unreadable`.
        """
        self.numbers: set[int] = set()
        """Whole numbers in the code, and in what it reads."""
        self.dicts: dict[int, dict[Any, Any]] = {}
        """Dicts that hold tensors or nothing, by id."""
        self._kept = kept
        self._package = _root(names.get("__name__"))
        self.cached: list[tuple[Mapping[str, Any], str, Any]] = []
        """(globals, name, function) of functions that `functools` keeps the results of."""
        self._there: dict[tuple[int, int], int] = {}
        self._held: list[Any] = []  # an id is one object's as long as that lives
        try:
            made_as = torch.get_default_dtype(), torch.get_default_device()  # where nothing else is said
            self.text = (made_as, self._code(code, names), *(self._value(v, code) for v in values))
        except (Unreadable, RecursionError):
            raise Unreadable from None
        except Exception as error:  # an object may raise anything when it is asked
            raise Unreadable from error
        self._held.clear()

    def _code(self, code: CodeType, names: Mapping[str, Any]) -> Any:
        attributes = {n for each in _codes(code) for n in each.co_names}
        if attributes & _ASKED:
            raise Unreadable
        found: list[Any] = [code]
        for name in sorted({n for each in _codes(code) for n in _loaded(each)}):
            if name in names:
                value = names[name]
                if isinstance(value, functools._lru_cache_wrapper):
                    self.cached.append((names, name, value))
                found.append((name, self._value(value, code)))
            elif name in _IMPURE:
                raise Unreadable
            else:
                found.append((name, getattr(builtins, name, None)))
        for each in _codes(code):
            for imported in _imported(each):
                self._library(imported)
            self._count(each.co_consts)
        return found

    def _count(self, constants: Sequence[Any]) -> None:
        for each in constants:
            if type(each) is int:
                self.numbers.add(each)
            elif isinstance(each, (tuple, frozenset)):
                self._count([*each])

    def _library(self, name: str) -> None:
        if _of_python(name) and _root(name) not in _PURE:
            raise Unreadable

    def _value(self, value: Any, code: CodeType) -> Any:
        if type(value) in _PLAIN:
            self._count([value])
            return type(value), repr(value)
        # Of a module, code reads the attributes that it names.
        key = (id(value), id(code) if isinstance(value, ModuleType) else 0)
        if key in self._there:
            return "again", self._there[key]
        self._there[key] = len(self._there)
        self._held.append(value)
        if len(self._there) > MOST_OBJECTS:
            raise Unreadable
        return self._object(value, code)

    def _object(self, value: Any, code: CodeType) -> Any:
        if isinstance(value, ModuleType):
            return self._module(value, code)
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, _IN_C):
            return value, self._owner(value, code)
        if isinstance(value, MethodType):
            return self._value(value.__func__, code), self._value(value.__self__, code)
        if isinstance(value, functools.partial):
            return [self._value(v, code) for v in (value.func, value.args, value.keywords)]
        if isinstance(value, functools._lru_cache_wrapper):
            return "kept results", self._value(value.__wrapped__, code)
        if isinstance(value, type):
            return self._class(value, code)
        if isinstance(value, (Tensor, np.ndarray)):
            return _numbers_of(value)
        if isinstance(value, (np.generic, torch.Size)):
            return type(value), repr(value)
        return self._container(value, code)

    def _container(self, value: Any, code: CodeType) -> Any:
        if type(value) is dict and all(map(_is_kept, value.values())):
            self.dicts[id(value)] = value
            if id(value) in self._kept:
                return "kept", id(value)
        if isinstance(value, (Mapping, types.MappingProxyType)):
            items = [(self._value(k, code), self._value(v, code)) for k, v in value.items()]
            return type(value), items, self._fields(value, code)
        if isinstance(value, (set, frozenset)):
            return type(value), sorted(repr(self._value(v, code)) for v in value)
        if isinstance(value, _LISTS):
            return type(value), [self._value(v, code) for v in value], self._fields(value, code)
        if isinstance(value, (staticmethod, classmethod)):
            return type(value), self._value(value.__func__, code)
        if isinstance(value, property):
            return [self._value(f, code) for f in (value.fget, value.fset, value.fdel)]
        if isinstance(value, functools.cached_property):
            return self._value(value.func, code)
        if isinstance(value, weakref.ReferenceType):
            return "reference", self._value(value(), code)
        if isinstance(value, _GETTERS):
            return self._value(value.__reduce__(), code)
        if isinstance(value, logging.Logger):
            return value
        return self._instance(value, code)

    def _instance(self, value: Any, code: CodeType) -> Any:
        cls = type(value)
        if isinstance(value, nn.Module) or (_of_python(cls.__module__) and cls is not types.SimpleNamespace):
            raise Unreadable  # an iterator, a lock, what is another thing in each thread
        if _root(cls.__module__) in ("builtins", "torch", "numpy"):
            raise Unreadable  # what it holds is not in Python
        number = next((text(value) for base, text in _BASES.items() if isinstance(value, base)), None)
        fields = self._fields(value, code)
        if number is None and not fields and not hasattr(value, "__dict__"):
            raise Unreadable
        return self._value(cls, code), number, fields

    def _fields(self, value: Any, code: CodeType) -> Any:
        if isinstance(value, (dict, list, tuple)) and type(value).__module__ in ("builtins", "collections"):
            return ()
        slots = [n for c in type(value).__mro__ for n in _slots(c) if hasattr(value, n)]
        own = [*getattr(value, "__dict__", {}).items(), *((n, getattr(value, n)) for n in slots)]
        return [(name, self._value(v, code)) for name, v in own]

    def _module(self, module: ModuleType, code: CodeType) -> Any:
        name = module.__name__
        file = getattr(module, "__file__", None) or ""
        own = vars(module)
        if _of_python(name):
            self._library(name)
        elif not self._is_library(name, file):
            asked = sorted({n for each in _codes(code) for n in each.co_names if n in own})
            return module, [(n, self._value(own[n], code)) for n in asked]
        # Of libraries: the same function, whoever put it there.
        found = [own[n] for n in sorted({n for each in _codes(code) for n in each.co_names}) if n in own]
        return module, [v for v in found if callable(v)]

    def _function(self, function: FunctionType) -> Any:
        code = function.__code__
        module = function.__module__ or ""
        if self._is_library(module, code.co_filename):
            self._library(module)
            return function
        cells = [c.cell_contents for c in function.__closure__ or () if _is_full(c)]
        parts = [function.__defaults__, function.__kwdefaults__, cells, [*vars(function).items()]]
        return function, self._code(code, function.__globals__), [self._value(p, code) for p in parts]

    def _is_library(self, module: str, file: str) -> bool:
        """Whether it is nothing of the model's own: what libraries do is taken on trust, that of its package is not."""
        if _of_python(module) or _root(module) in ("torch", "numpy") or _is_python(file):
            return True
        return file.startswith(LIBRARIES) and _root(module) != self._package

    def _owner(self, value: Any, code: CodeType) -> Any:
        owner = getattr(value, "__self__", None)
        if value.__name__ in _ASKED | (_IMPURE if owner is builtins else set()):
            raise Unreadable
        if owner is None or isinstance(owner, (ModuleType, type)):
            self._library(getattr(owner, "__module__" if isinstance(owner, type) else "__name__", None) or "")
            return None
        return self._value(owner, code)

    def _class(self, cls: type, code: CodeType) -> Any:
        file = getattr(sys.modules.get(cls.__module__), "__file__", None) or ""
        if _of_python(cls.__module__):
            self._library(cls.__module__)
            return cls
        if self._is_library(cls.__module__, file):
            return cls
        # Methods that `dataclasses` writes follow from the fields.
        written = "<string>" if "__dataclass_fields__" in vars(cls) else ""
        own = [(k, v) for k, v in vars(cls).items() if k not in _MADE_BY_PYTHON and not _is_slot(v)]
        own = [(k, v) for k, v in own if not written or getattr(_code_of(v), "co_filename", "") != written]
        found = [(name, self._value(v, code)) for name, v in own]
        return cls, found, [self._value(base, code) for base in cls.__bases__]


def is_library(module: ModuleType) -> bool:
    """Whether it is one of those that tables are made with, which nobody exchanges for another."""
    root = _root(module.__name__)
    return root in ("torch", "numpy") or (_of_python(root) and root in _PURE)


def watched(
    code: CodeType, names: Mapping[str, Any], values: Sequence[Any], kept: Collection[int]
) -> Callable[[], bool]:
    """A question: is anything that the code reaches another now than it is at this moment?"""
    before = Reached(code, names, values, kept).text

    def changed() -> bool:
        try:
            return Reached(code, names, values, kept).text != before
        except Unreadable:
            return True

    return changed


def _of_python(module: str) -> bool:
    return _root(module) in sys.stdlib_module_names and module != "__main__"


def _is_python(file: str) -> bool:
    return file.startswith(STDLIB) and not file.startswith(INSTALLED)  # which may lie inside


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


@functools.lru_cache(4096)
def _loaded(code: CodeType) -> frozenset[str]:
    """Names of globals that the code reads, or writes."""
    asked = ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_FROM_DICT_OR_GLOBALS")
    return frozenset(i.argval for i in dis.get_instructions(code) if i.opname in asked)


@functools.lru_cache(4096)
def _imported(code: CodeType) -> frozenset[str]:
    return frozenset(i.argval for i in dis.get_instructions(code) if i.opname == "IMPORT_NAME")


def _numbers_of(value: Tensor | np.ndarray[Any, Any]) -> Any:
    """All numbers of a small one; the description holds none of its memory."""
    if isinstance(value, Tensor):
        if (
            isinstance(value, nn.Parameter)
            or value.is_meta
            or value.numel() > MOST_NUMBERS
            or type(value) is not Tensor
        ):
            raise Unreadable
        array = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return id(value), value.dtype, value.device, value.shape, value.stride(), array.tobytes()
    if value.size > MOST_NUMBERS or value.dtype.hasobject:
        raise Unreadable
    return value.dtype.str, value.shape, value.strides, value.tobytes()


def _is_kept(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and bool(value) and all(map(_is_kept, value)))


def _is_full(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _slots(cls: type) -> Sequence[str]:
    slots = vars(cls).get("__slots__", ())
    return [slots] if isinstance(slots, str) else [s for s in slots if s not in ("__dict__", "__weakref__")]


def _code_of(value: Any) -> CodeType | None:
    return getattr(value, "__code__", None)


def _is_slot(value: Any) -> bool:
    return isinstance(value, (types.MemberDescriptorType, types.GetSetDescriptorType))
