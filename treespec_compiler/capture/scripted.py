"""Scripted and traced submodules: while a model is traced, Python that runs the same ops stands in their place.

`script_code` writes it. A stand-in holds the module's own parameters and buffers; what else its code has of the module
is what it read then, and another one is made once any of it is another.
"""

from __future__ import annotations

import contextlib
import itertools
import linecache
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .script_code import Attributes, NotWritten, python_code


@contextlib.contextmanager
def scripts_as_python(model: nn.Module) -> Iterator[None]:
    """With Python in place of each scripted submodule for which there is some. They are back afterwards."""
    swapped = list(_scripts(model))
    try:
        for parent, name, child in swapped:
            stand_in = _stand_in(child)
            if stand_in is not None:
                parent._modules[name] = stand_in
        yield
    finally:
        for parent, name, child in swapped:
            parent._modules[name] = child


def has_scripts(model: nn.Module) -> bool:
    return any(True for _ in _scripts(model))


def _scripts(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.jit.ScriptModule]]:
    """(parent, name, module) of the outermost ones, below the model."""
    if isinstance(model, torch.jit.ScriptModule):
        return
    for name, child in model._modules.items():
        if isinstance(child, torch.jit.ScriptModule):
            yield model, name, child
        elif child is not None:
            yield from _scripts(child)


_STAND_INS: weakref.WeakKeyDictionary[torch.jit.ScriptModule, tuple[list[Any], nn.Module | None]] = (
    weakref.WeakKeyDictionary()
)


def _stand_in(module: torch.jit.ScriptModule) -> nn.Module | None:
    """The same one for as long as the module is what it was; None where there is no Python for it."""
    read, known = _STAND_INS.get(module, ([], None))
    if known is not None and all(_same(_now(module, path, key), value) for path, key, value in read):
        return known
    if any(_hooked(part) for part in module.modules()):
        return None
    try:
        code, attributes = python_code(module)
    except NotWritten:
        return None
    made = _module_of(type(module).__name__, code, attributes)
    _STAND_INS[module] = (attributes.read, made)
    return made


def _now(module: nn.Module, path: str, key: str) -> Any:
    here: Any = module
    for name in [*filter(None, path.split(".")), key]:
        here = getattr(here, name, None)
    return here


def _same(now: Any, then: Any) -> bool:
    if isinstance(now, Tensor) or isinstance(then, Tensor):
        return now is then
    return type(now) is type(then) and bool(now == then)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _module_of(name: str, code: str, attributes: Attributes) -> nn.Module:
    """A module of a class of its own, whose forward is that code."""
    file = f"<TorchScript {next(_NUMBERS)}>"
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    names: dict[str, Any] = {"torch": torch, "__name__": __name__}
    exec(compile(code, file, "exec"), names)
    made: nn.Module = type(name, (nn.Module,), {"forward": names["forward"], "__module__": __name__})()
    for key, value in attributes.tensors.items():
        if isinstance(value, nn.Parameter):
            made.register_parameter(key, value)
        else:
            made.register_buffer(key, value)
    return made.eval()


_NUMBERS = itertools.count()
