"""The objects that a walk over a model's state found, and where: looking again is a hundred times cheaper than walking.

A walk reads containers, and what is in them. As long as each holds the very same objects, another walk finds the same;
where one does not, it may still (a counter that was set to an equal number): a difference says "walk again", no more.
"""

from __future__ import annotations

import types
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from functools import partial
from operator import is_
from typing import Any

import numpy as np
from torch import Tensor, nn

MOST_ARRAY_BYTES = 1 << 12
_ABSENT = object()
HEAP = 1 << 9
"""Flag of a class that Python code made."""


class Whereabouts:
    """What was where. Holds what it lists, but not the model itself: whoever keeps this keeps no model alive by it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self.known = True
        """False: something was met that cannot be compared at a glance."""
        self._mappings: list[tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = []
        self._named: list[tuple[Callable[..., Any], tuple[str, ...], list[Any]]] = []
        self._sequences: list[tuple[Any, tuple[Any, ...]]] = []
        self._sets: list[tuple[set[Any], frozenset[Any]]] = []
        self._types: list[tuple[Any, type]] = []
        self._results: list[tuple[Callable[[], Any], Any]] = []
        self._tensors: list[tuple[Tensor, tuple[Any, ...]]] = []
        self._arrays: list[tuple[Any, bytes]] = []

    def named(self, mapping: Mapping[str, Any], names: Iterable[str]) -> None:
        """What these names mean in a mapping that others write into too: the globals of a module."""
        names = tuple(names)
        self._named.append((mapping.get, names, [mapping.get(name, _ABSENT) for name in names]))

    def back_at_the_model(self) -> None:
        """The walk came to the model once more: listing what refers to it would keep it alive."""
        self.known = False

    def add(self, value: Any) -> None:
        """An object that the walk goes into, once each."""
        if isinstance(value, Tensor):
            self._tensors.append((value, _place_of(value)))
        elif isinstance(value, types.ModuleType):
            return  # by `named`
        elif isinstance(value, type):
            if value.__flags__ & HEAP:
                self._mapping(vars(value))
                self._results.append((lambda: value.__mro__, value.__mro__))
            return
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, (np.ndarray, np.generic)):
            if value.nbytes > MOST_ARRAY_BYTES or value.dtype.hasobject:
                self.known = False
            else:
                self._arrays.append((value, value.tobytes()))
        elif isinstance(value, (weakref.ref, ContextVar)):
            read: Callable[[], Any] = value if isinstance(value, weakref.ref) else lambda: value.get(None)
            if read() is self._model():
                self.known = False
            self._results.append((read, read()))
        else:
            self._container(value)
        self._attributes(value)

    def _container(self, value: Any) -> None:
        if isinstance(value, (dict, types.MappingProxyType)):
            self._mapping(value)
            if isinstance(value, defaultdict):
                self._results.append((lambda: value.default_factory, value.default_factory))
        elif isinstance(value, (list, deque)):
            self._sequences.append((value, tuple(value)))
        elif isinstance(value, set):
            self._sets.append((value, frozenset(value)))

    def _function(self, value: types.FunctionType) -> None:
        read = lambda: (value.__code__, value.__defaults__, value.__kwdefaults__)  # noqa: E731
        self._sequences.append((_Read(read), read()))
        for cell in value.__closure__ or ():
            self._results.append((partial(_inside, cell), _inside(cell)))

    def _attributes(self, value: Any) -> None:
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            self._mapping(own)
        cls = type(value)
        if not cls.__flags__ & HEAP:
            return
        if value is not self._model():
            self._types.append((value, cls))
        for base in cls.__mro__:
            slots = vars(base).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else tuple(slots):
                if name not in ("__dict__", "__weakref__"):
                    self.known &= value is not self._model()  # what reads it would hold it
                    read = partial(getattr, value, name, _ABSENT)
                    self._results.append((read, read()))

    def _mapping(self, value: Any) -> None:
        self._mappings.append((value, tuple(value), tuple(value.values())))

    def same(self, model: nn.Module) -> bool:
        """Whether everything of the model is where it was, in the time of some thousand comparisons of addresses."""
        try:
            return self.known and self._model() is model and self._look()
        except (RuntimeError, ReferenceError, AttributeError, TypeError):
            return False  # somebody writes at this moment, or made something else of an object

    def _look(self) -> bool:
        return (
            all(
                len(now) == len(keys) and all(map(is_, now, keys)) and all(map(is_, now.values(), values))
                for now, keys, values in self._mappings
            )
            and all(all(map(is_, [get(n, _ABSENT) for n in names], was)) for get, names, was in self._named)
            and all(len(now) == len(was) and all(map(is_, now, was)) for now, was in self._sequences)
            and all(type(each) is cls for each, cls in self._types)
            and all(read() is was for read, was in self._results)
            and all(_place_of(each) == was for each, was in self._tensors)
            and all(now == was for now, was in self._sets)
            and all(now.tobytes() == was for now, was in self._arrays)
        )


class _Read:
    """Attributes as a sequence that is read when it is compared."""

    def __init__(self, read: Callable[[], tuple[Any, ...]]) -> None:
        self._read = read

    def __len__(self) -> int:
        return len(self._read())

    def __iter__(self) -> Any:
        return iter(self._read())


def _inside(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _ABSENT


def _place_of(tensor: Tensor) -> tuple[Any, ...]:
    """All of a tensor but its numbers."""
    storage = None if tensor.is_meta else tensor.untyped_storage()
    return (
        *((None, 0) if storage is None else (storage._cdata, storage.nbytes())),
        *(tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.storage_offset()),
        *(tensor.requires_grad, tensor.is_leaf, tensor.is_conj(), tensor.is_neg()),
    )
