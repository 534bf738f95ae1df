"""What forward reads and Dynamo's guards leave out: methods of classes, torch's hooks on every module, the environment,
attributes that a class finds by itself, and the order of ordered dictionaries.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from types import CodeType
from typing import Any

from torch import Tensor, nn

from .fills import begins
from .installed import LIBRARIES

GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
MOST_BELOW = 20  # classes under one that are watched with it; more inherit from the like of `nn.Module`


class Unguarded:
    """Such state as it was when a model was traced. Holds no module."""

    def __init__(self, model: nn.Module, code: Sequence[CodeType]) -> None:
        """`code`: of all functions that the trace went through."""
        self._classes = _classes_of(code)
        self._methods = self._methods_of(model)
        self._hooks = global_hooks()
        self._names = _names(model)
        self.variables = _variables(code)
        """Of the environment, those that forward may have read; None: any."""
        self._environment = self._read()

    def changed(self, model: nn.Module) -> str | None:
        """What is another now; None: nothing."""
        if global_hooks() != self._hooks:
            return "a hook on every module"
        if self._methods_of(model) != self._methods:
            return "a method of a class"
        if _names(model) != self._names:
            return "an attribute that came, went, or changed its place"
        if self._environment != self._read():
            return "a variable of the environment"
        return None

    def _read(self) -> dict[str, str]:
        """Of the environment, what forward may have read."""
        names = self.variables
        return dict(os.environ) if names is None else {k: v for k, v in os.environ.items() if k in names}

    def _methods_of(self, model: nn.Module) -> dict[type, list[tuple[str, Any, Any]]]:
        """(name, object, code) of what is callable in the classes of the modules, of other objects, and their bases."""
        types = {*map(type, model.modules()), *self._classes, Tensor}
        mro = {cls for each in types for cls in each.__mro__}
        found = mro - {object}
        return {cls: [(k, v, code) for k, v in [*vars(cls).items()] if (code := _code(v)) is not None] for cls in found}


def _classes_of(code: Iterable[CodeType]) -> set[type]:
    """The classes whose methods were traced, and those that inherit from them: Dynamo does not guard the methods of
    objects besides the model's modules.
    """
    of: dict[str, set[CodeType]] = {}
    for each in code:
        of.setdefault(each.co_qualname.rpartition(".")[0], set()).add(each)
    named = [cls for cls in _below(object) if cls.__qualname__ in of]
    found = {cls for cls in named if any(_code(value) in of[cls.__qualname__] for value in [*vars(cls).values()])}
    below = {cls: _below(cls) for cls in found}
    return found | {cls for many in below.values() if len(many) <= MOST_BELOW for cls in many}


def _below(base: type) -> set[type]:
    """All classes that inherit from this one; those that are made of a metaclass of their own as well."""
    found: set[type] = set()
    pending = [base]
    while pending:
        new: set[type] = set(type.__subclasses__(pending.pop())) - found
        found |= new
        pending += new
    return found


_WORDS = {"environ", "environb", "getenv", "getenvb"}


def _variables(traced: Iterable[CodeType]) -> frozenset[str] | None:
    """Variables of the environment that the traced code may read, which Dynamo takes for constants; None: any.

    Installed libraries write the names out where they ask. Other code may make them up. Variables that nobody asks
    for change for reasons of their own, at any time.
    """
    traced = list(traced)
    asking = [code for code in traced if code.co_filename != os.__file__ and _WORDS & {*code.co_names}]
    if not asking:  # yet somebody called what lies in `os`
        return None if any(code.co_filename == os.__file__ for code in traced) else frozenset()
    if not all(code.co_filename.startswith(LIBRARIES) for code in asking):
        return None
    found = (const for code in asking for const in code.co_consts)
    return frozenset(os.fsdecode(const) for const in found if isinstance(const, (str, bytes)))


_EVERY_MODULES = vars(nn.Module()).keys()


def _names(model: nn.Module) -> list[list[Any]]:
    """What Dynamo's guards leave out of a lookup: names of attributes where a class finds missing ones by itself, and
    the order of ordered dictionaries, which `move_to_end` changes.
    """
    found: list[list[Any]] = []
    for module in model.modules():
        own = vars(module)
        if type(module).__getattr__ is not nn.Module.__getattr__:
            found.append(sorted(own.keys() - begins(type(module)).keys()))
        found += [list(v) for k, v in own.items() if isinstance(v, OrderedDict) and k not in _EVERY_MODULES]
    return found


def global_hooks() -> list[Any]:
    """What torch calls around the forward pass of every module."""
    from torch.nn.modules import module

    return [hook for name in GLOBAL_HOOKS for hook in getattr(module, name).values()]


def _code(value: Any) -> Any | None:
    """The code of a method, so that one patched in place is another; None: not a method."""
    inner: Callable[..., Any] | None = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    return getattr(inner, "__code__", None)
