"""A digest of the Python state that a trace may have read, equal in another process where a trace there reads the same.

A trace depends on where it begins, and on each thing that it reads on its way: attributes, items, globals, closures,
the code of functions. So where all of these are the same, it takes the same way. What it went through is known
(`traced` code); what that code can read is found by walking from the model: every object whose name the traced code
writes is walked whole, and of others the values and types that are plain. Functions that were not traced are taken
by their code, and those that were by all that their code names, too.

What cannot be told in words that another process understands (an object of C, a lock) raises `Undigested`. Values of
parameters are no part of it: those that a proof used are compared by whoever has the proof.
"""

from __future__ import annotations

import builtins
import contextvars
import enum
import functools
import hashlib
import logging
import re
import sys
import threading
import types
import typing
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .code import code_digest, imported_modules, inner_code, names_in
from .state_names import ALWAYS, BOOKKEEPING, NOT_READ, TRUSTED
from .tensor_bytes import tensor_bytes
from .whereabouts import HEAP, Whereabouts

# Objects; a model of 30 layers has some ten thousand.
MOST_OBJECTS = 400_000
MOST_TENSOR_BYTES = 256 << 20


class Undigested(Exception):
    """Something that a trace may have read has no digest: where it is, and what."""


class PythonState:
    """The digest of `roots`, for a trace that went through code with the digests `traced`, which writes `names`."""

    def __init__(
        self,
        roots: Mapping[str, Any],
        traced: Iterable[str],
        names: Iterable[str],
        whereabouts: Whereabouts | None = None,
    ) -> None:
        """`whereabouts`: takes down where the walk goes."""
        self._whereabouts = whereabouts
        self._traced, self._names = frozenset(traced), frozenset(names) | ALWAYS
        self.met: set[str] = set()
        """Those of the traced code that the walk came to."""
        self._tokens: list[bytes] = []
        self._values = hashlib.sha256()
        self._bytes = 0
        self._seen: dict[tuple[int, bool], int] = {}
        self._held: list[Any] = []  # so that no address is given twice
        self._codes: dict[int, str] = {}
        self._storages: dict[int, int] = {}
        from torch._dynamo import mutation_guard

        mutation_guard.install_generation_tagging_init()  # a first trace replaces two methods of every module
        self._allowed = _allowed_in_graphs()
        try:
            for name, value in roots.items():
                self._token("root", name)
                self._visit(value, name, True)
        except RecursionError:
            raise Undigested("the state of the model is nested too deeply") from None
        self.structure = hashlib.sha256(b"\n".join(self._tokens)).hexdigest()
        """Of everything but the values of tensors."""
        self.values = self._values.hexdigest()
        """Of tensors that are no parameters."""

    def _token(self, *parts: Any) -> None:
        self._tokens.append("\t".join(map(str, parts)).encode(errors="surrogatepass"))

    def _visit(self, value: Any, path: str, strict: bool) -> None:
        kind = type(value)
        if kind in _PLAIN:
            self._token(kind.__name__, repr(value))
            return
        key = (id(value), strict)
        known = self._seen.get((id(value), True), self._seen.get(key))
        if known is not None:
            self._token("seen", known)
            if self._whereabouts is not None and known == 0:
                self._whereabouts.back_at_the_model()
            return
        self._seen[key] = len(self._held)
        self._held.append(value)
        if len(self._held) > MOST_OBJECTS:
            raise Undigested(f"more than {MOST_OBJECTS} objects, at {path}")
        if self._whereabouts is not None:
            self._whereabouts.add(value)
        self._token(kind.__module__, kind.__qualname__)
        for types_, visit in _RULES:
            if isinstance(value, types_):
                visit(self, value, path, strict)
                return
        self._object(value, path, strict)

    # containers

    def _sequence(self, value: Any, path: str, strict: bool) -> None:
        self._token(len(value))
        for i, each in enumerate(value):
            self._visit(each, f"{path}[{i}]", strict)
        self._subclass(value, path, strict, (list, tuple, deque, torch.Size))

    def _dict(self, value: Any, path: str, strict: bool) -> None:
        items = list(value.items())
        self._token(len(items))
        for k, each in items:
            self._visit(k, f"{path} key", strict)
            self._visit(each, f"{path}[{k!r:.40}]", strict)
        if isinstance(value, defaultdict):
            self._visit(value.default_factory, f"{path} default", strict)
        self._subclass(value, path, strict, (dict, OrderedDict, defaultdict, types.MappingProxyType))

    def _set(self, value: Any, path: str, strict: bool) -> None:
        """NOTE texts come in another order in each process, so there is no order of them that a model means."""
        if all(type(each) in (int, bool, float) for each in value):
            self._token(list(value))
        elif all(type(each) in _PLAIN for each in value):
            self._token(sorted(f"{type(each).__name__} {each!r}" for each in value))
        elif all(hasattr(each, "__qualname__") for each in value):  # classes and functions
            for each in sorted(value, key=lambda each: (str(each.__module__), each.__qualname__)):
                self._visit(each, f"{path} element", strict)
        elif strict:
            raise Undigested(f"{path}, a set of objects")
        self._subclass(value, path, strict, (set, frozenset))

    def _subclass(self, value: Any, path: str, strict: bool, plain: tuple[type, ...]) -> None:
        if type(value) not in plain:
            self._object(value, path, strict)

    # functions

    def _function(self, value: types.FunctionType, path: str, strict: bool) -> None:
        digest = self._code(value.__code__)
        self._token("code", digest)
        traced = digest in self._traced
        if not traced and not strict:
            return
        if (value.__module__, value.__qualname__) in _OF_VERSIONS:
            return
        if id(value) in self._allowed or "_dynamo_marked_constant" in vars(value):
            raise Undigested(f"{path}, a function that a trace calls without reading it")
        self._visit(value.__defaults__, f"{path} defaults", True)
        self._visit(value.__kwdefaults__, f"{path} defaults", True)
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=False):
            try:
                inside = cell.cell_contents
            except ValueError:
                self._token("empty")
                continue
            self._visit(inside, f"{path}:{name}", traced)
        self._attributes(vars(value), path, strict)
        if traced:
            self._globals(value, path)

    def _code(self, code: types.CodeType) -> str:
        digest = self._codes.get(id(code))
        if digest is None:
            self._held.append(code)
            digest = self._codes[id(code)] = code_digest(code)
            if digest in self._traced:
                self.met.update(code_digest(inner) for inner in inner_code(code))
        return digest

    def _globals(self, function: types.FunctionType, path: str) -> None:
        """What the code of a traced function finds by name."""
        around = function.__globals__
        found: set[str] = set()
        modules: set[str] = set()
        for code in inner_code(function.__code__):
            found |= names_in(code)
            modules |= imported_modules(code, str(around.get("__package__") or ""))
        if self._whereabouts is not None:
            for mapping, read in ((around, found), (vars(builtins), found), (sys.modules, modules)):
                self._whereabouts.named(mapping, read)
        for name in sorted(found):
            if name in around:
                self._token("global", name)
                self._visit(around[name], f"{around.get('__name__')}.{name}", True)
            elif name in vars(builtins):
                self._token("builtin", name)
                self._visit(vars(builtins)[name], name, True)
        for name in sorted(modules):
            self._token("import", name)
            self._visit(sys.modules.get(name), name, True)

    def _method(self, value: types.MethodType, path: str, strict: bool) -> None:
        self._visit(value.__func__, path, strict)
        self._visit(value.__self__, f"{path}.__self__", strict)

    def _partial(self, value: functools.partial[Any], path: str, strict: bool) -> None:
        for name in ("func", "args", "keywords"):
            self._visit(getattr(value, name), f"{path}.{name}", strict)
        self._attributes(vars(value), path, strict)

    def _wrapped(self, value: Any, path: str, strict: bool) -> None:
        for name in ("fget", "fset", "__func__", "func", "__wrapped__"):
            inner = getattr(value, name, None)
            if inner is not None:
                self._token(name)
                self._visit(inner, path, strict)

    def _builtin(self, value: Any, path: str, strict: bool) -> None:
        self._token(getattr(value, "__module__", ""), getattr(value, "__qualname__", getattr(value, "__name__", "")))
        owner = getattr(value, "__self__", None)
        if owner is not None and not isinstance(owner, (types.ModuleType, type)):
            self._visit(owner, f"{path}.__self__", strict)

    # modules, classes, objects

    def _module(self, value: types.ModuleType, path: str, strict: bool) -> None:
        """What traced code may name in it; of a library's modules its functions and classes, which somebody may have
        replaced."""
        self._token(value.__name__)
        if not strict:
            return
        own = vars(value)
        if self._whereabouts is not None:
            self._whereabouts.named(own, self._names)
        of_torch = value.__name__.partition(".")[0] in TRUSTED
        for name in sorted(self._names & own.keys()):
            each = own[name]
            if not of_torch:
                self._token("in module", name)
                self._visit(each, f"{value.__name__}.{name}", True)
            elif isinstance(each, types.FunctionType):
                self._token("in module", name)
                self._visit(each, f"{value.__name__}.{name}", False)
            else:
                self._token("in module", name, type(each).__module__, type(each).__qualname__)
                if type(each) in _PLAIN:
                    self._token(repr(each))

    def _class(self, value: type, path: str, strict: bool) -> None:
        self._token(value.__module__, value.__qualname__)
        if not value.__flags__ & HEAP:
            return
        if not strict:
            return
        if type(value) is not type:
            self._visit(type(value), f"{path} metaclass", True)
        for base in value.__mro__[1:]:
            self._token("base")
            self._visit(base, base.__qualname__, True)
        for name, each in sorted(vars(value).items()):
            if name in NOT_READ:
                continue
            self._token("in class", name)
            self._visit(each, f"{value.__qualname__}.{name}", self._reads(name))

    def _reads(self, name: str) -> bool:
        return name in self._names

    def _object(self, value: Any, path: str, strict: bool) -> None:
        cls = type(value)
        hidden = next((c for c in cls.__mro__ if not c.__flags__ & HEAP and c not in _OPEN), None)
        if hidden is not None and strict:
            raise Undigested(f"{path}, a {cls.__module__}.{cls.__qualname__}")
        if hidden is not None:
            return
        if strict:
            self._visit(cls, cls.__qualname__, True)
        self._attributes(getattr(value, "__dict__", {}), path, strict)
        for base in cls.__mro__:
            slots = vars(base).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else tuple(slots):
                if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                    self._token("slot", name)
                    self._visit(getattr(value, name), f"{path}.{name}", strict and self._reads(name))

    def _attributes(self, own: Mapping[str, Any], path: str, strict: bool) -> None:
        """Of what no traced code names, somebody may have made the name up; what is read of it then is named."""
        for name in sorted(own, key=str):
            if name in BOOKKEEPING or not (strict or self._reads(str(name))):
                continue
            self._token("attribute", name)
            self._visit(own[name], f"{path}.{name}", strict and self._reads(str(name)))

    # values

    def _tensor(self, value: Tensor, path: str, strict: bool) -> None:
        if value.layout is not torch.strided or type(value) not in (Tensor, nn.Parameter, nn.Buffer):
            raise Undigested(f"{path}, a {type(value).__name__} laid out as {value.layout}")
        self._token(value.dtype, value.device, tuple(value.shape), value.stride(), value.storage_offset())
        self._token(value.requires_grad, value.is_leaf, value.is_inference(), value.is_conj(), value.is_neg())
        if value.is_meta:
            return
        storage = value.untyped_storage()
        self._token("storage", self._storages.setdefault(storage._cdata, len(self._storages)), storage.nbytes())
        if isinstance(value, nn.Parameter):
            return
        self._bytes += value.numel() * value.element_size()
        if self._bytes > MOST_TENSOR_BYTES:
            raise Undigested(f"{path}: buffers of more than {MOST_TENSOR_BYTES >> 20} MB")
        self._values.update(tensor_bytes(value))

    def _array(self, value: Any, path: str, strict: bool) -> None:
        if value.dtype.hasobject:
            raise Undigested(f"{path}, an array of objects")
        self._token(value.dtype.str, value.shape, hashlib.sha256(value.tobytes()).hexdigest())

    def _text(self, value: Any, path: str, strict: bool) -> None:
        self._token(str(value))

    def _enum(self, value: enum.Enum, path: str, strict: bool) -> None:
        self._token(value.name)
        self._visit(value._value_, path, False)
        self._visit(type(value), type(value).__qualname__, strict)

    def _pattern(self, value: re.Pattern[Any], path: str, strict: bool) -> None:
        self._token(repr(value.pattern), value.flags)

    def _context(self, value: contextvars.ContextVar[Any], path: str, strict: bool) -> None:
        self._token(value.name)
        self._visit(value.get(None), path, strict)

    def _reference(self, value: Any, path: str, strict: bool) -> None:
        self._visit(value(), path, strict)

    def _nothing(self, value: Any, path: str, strict: bool) -> None:
        """Holds nothing that a model computes with."""


_PLAIN = {type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented)}

_OPEN = (object, list, dict, tuple, set, frozenset, deque, OrderedDict, defaultdict, int, str, float, bytes)


_OF_VERSIONS = {
    ("transformers.utils.import_utils", name) for name in ("is_torch_greater_or_equal", "is_torch_less_or_equal")
}
"""Functions whose results a trace takes for constants, and which tell of torch's version alone: a key has that."""


def _allowed_in_graphs() -> set[int]:
    from torch._dynamo import trace_rules

    ids: Any = trace_rules._allowed_callable_ids
    users: set[int] = set(ids.function_ids or ())
    return users


_Rule = tuple[Any, Callable[[PythonState, Any, str, bool], None]]
_RULES: tuple[_Rule, ...] = (
    (Tensor, PythonState._tensor),
    (nn.Module, PythonState._object),
    (types.FunctionType, PythonState._function),
    (types.MethodType, PythonState._method),
    (functools.partial, PythonState._partial),
    ((property, staticmethod, classmethod, functools.cached_property), PythonState._wrapped),
    (functools._lru_cache_wrapper, PythonState._wrapped),
    (
        (
            *(types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType),
            *(types.GetSetDescriptorType, types.MemberDescriptorType, types.ClassMethodDescriptorType),
            *(types.MethodWrapperType, np.ufunc),
        ),
        PythonState._builtin,
    ),
    (types.ModuleType, PythonState._module),
    (enum.Enum, PythonState._enum),
    (
        (types.GenericAlias, types.UnionType, typing.TypeVar, type(typing.ClassVar), type(typing.ClassVar[int])),
        PythonState._text,
    ),
    (type, PythonState._class),
    ((dict, types.MappingProxyType), PythonState._dict),
    ((list, tuple, deque), PythonState._sequence),
    ((set, frozenset), PythonState._set),
    (
        (torch.dtype, torch.device, torch.layout, torch.memory_format, np.dtype, PurePath, range, slice),
        PythonState._text,
    ),
    ((np.ndarray, np.generic), PythonState._array),
    (re.Pattern, PythonState._pattern),
    (contextvars.ContextVar, PythonState._context),
    (weakref.ref, PythonState._reference),
    ((logging.Logger, type(threading.Lock()), type(threading.RLock())), PythonState._nothing),
)
