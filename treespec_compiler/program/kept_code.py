"""Compiled code of programs on disk, kept by the user that compiled it: libraries, and in which order they are called.

Inductor's own cache spares the C++ compiler; its way back through AOTAutograd takes seconds, and its imports more. A
program that was read from a disk has a name, the checksum of its file, and what was compiled for it is kept under that
name: the libraries that Inductor built and the slots of the values between them. It lies in the user's cache directory,
which nobody else may write to, never in a folder that came from elsewhere: a library is code.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..logs import logger
from ..user_cache import cache_dir, replacing, write_whole

log = logger(__name__)

SCHEMA = 1
MOST = 64
"""Programs whose code is kept."""
_FORGOTTEN_SECONDS = 3600.0  # after which nobody is about to name a library that no plan names
_NAMED: set[str] = set()
"""Folders that could not be written to, of which a warning was given."""
_ENTRY = "inductor_entry_cpp"
_POINTERS = "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"
# What Inductor's wrapper of a library does besides the call: another one passes constants, which are not in a library.
_WRAPPER = {
    *("torch", "Tensor", "tensor", "_C", "_aoti", "unsafe_alloc_void_ptrs_from_tensors", "clear"),
    *("alloc_tensors_by_stealing_from_void_ptrs", "isinstance"),
}

LibraryCall = Callable[[list[Any]], Sequence[Tensor]]


@dataclass(frozen=True)
class CallPlan:
    """Calls of libraries in turn: values lie in slots, those of the inputs first."""

    steps: Sequence[tuple[int, Sequence[int], Sequence[int]]]
    """(which library, slots that it takes, slots that it gives)."""
    room: int
    """Slots beside the inputs."""
    ends: Sequence[int]
    """Slots of the outputs."""

    def run(self, calls: Sequence[LibraryCall]) -> LibraryCall:
        """The plan with these libraries; it may empty the list it is given."""
        steps = [(calls[which], [*takes], [*gives]) for which, takes, gives in self.steps]
        room, ends = [None] * self.room, [*self.ends]

        def run(values: list[Any]) -> Sequence[Tensor]:
            values += room
            for call, takes, gives in steps:
                for slot, value in zip(gives, call([values[i] for i in takes]), strict=True):
                    values[slot] = value
            return [values[i] for i in ends]

        return run


def library_of(call: Any) -> Path | None:
    """The library behind the code of a graph, where it is all there is to it."""
    code, cells = getattr(call, "__code__", None), list(getattr(call, "__closure__", None) or ())
    if code is None or code.co_freevars != ("f",) or not _names(code) <= _WRAPPER:
        return None
    (entry,) = (cell.cell_contents for cell in cells)
    path = getattr(getattr(entry, "__self__", None), "__file__", None)
    return Path(path) if path and getattr(entry, "__name__", "") == _ENTRY else None


def _names(code: Any) -> set[str]:
    inner = [each for each in code.co_consts if hasattr(each, "co_names")]
    return {*code.co_names}.union(*map(_names, inner))


def keep(name: str, plan: CallPlan, libraries: Sequence[Path]) -> None:
    """Keep the code of a program of this name; where it cannot be, a log says why."""
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in libraries]
        for path, found in zip(libraries, hashes, strict=True):
            with replacing(folder / f"{found}.so") as temporary:
                shutil.copyfile(path, temporary)
        about: dict[str, Any] = {"schema": SCHEMA, "libraries": hashes, "room": plan.room, "ends": [*plan.ends]}
        about["steps"] = [(which, [*takes], [*gives]) for which, takes, gives in plan.steps]
        write_whole(folder / f"{name}.json", json.dumps(about))
    except OSError as error:
        level = logging.INFO if str(folder) in _NAMED else logging.WARNING  # once, as of saved programs
        _NAMED.add(str(folder))
        log.log(level, "compiled code is not kept in %s: %s", folder, error)
        return
    with contextlib.suppress(OSError):
        _evict(folder)


def find(name: str) -> LibraryCall | None:
    """The code that was kept under this name; None: there is none that can be used."""
    folder = _folder()
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    try:
        about = json.loads(_own(path).read_text(encoding="utf-8"))
        if about["schema"] != SCHEMA:
            return None
        calls = [_loaded(_own(folder / f"{found}.so"), found) for found in about["libraries"]]
        steps = [(int(which), takes, gives) for which, takes, gives in about["steps"]]
        with contextlib.suppress(OSError):
            os.utime(path)
        return CallPlan(steps, int(about["room"]), about["ends"]).run(calls)
    except (OSError, ValueError, TypeError, LookupError, ImportError, PermissionError) as error:
        log.warning("the code kept in %s is not used: %s: %s", path, type(error).__name__, error)
        return None


def _own(path: Path) -> Path:
    """Raises PermissionError for a file that another user wrote, or may write."""
    status = path.lstat()
    foreign = hasattr(os, "getuid") and status.st_uid != os.getuid()
    if path.is_symlink() or foreign or status.st_mode & 0o022:
        raise PermissionError(f"{path.name} is a link, or another user may write it")
    return path


def _loaded(path: Path, expected: str) -> LibraryCall:
    """A library's function, called as Inductor's own wrapper does."""
    if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        raise ValueError(f"{path.name} was changed")
    # NOTE a part of torch's extension module, there without the import of Dynamo
    guards: Any = torch._C._dynamo.guards
    os.environ[_POINTERS] = str(guards._torchinductor_pyobject_tensor_data_ptr)
    name = f"treespec_kept.{expected}.{_ENTRY}"
    module = sys.modules.get(name)
    if module is None:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    entry = getattr(module, _ENTRY)
    handles, tensors = (
        torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors,
        torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs,
    )

    def call(inputs: list[Any]) -> Sequence[Tensor]:
        given = handles(inputs)
        inputs.clear()
        found: Sequence[Tensor] = tensors(entry(given))
        return found

    return call


def _folder() -> Path:
    return cache_dir() / "code"


def clear() -> int:
    """Remove what is kept; returns of how many programs it was."""
    plans = [*_folder().glob("*.json")]
    for path in (*plans, *_folder().glob("*.so")):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    return len(plans)


def _evict(folder: Path) -> None:
    """Keep the last used ones, and the libraries that they name. Other processes may do so at the same time."""
    used: dict[Path, float] = {}
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError):
            used[path] = path.stat().st_mtime
    plans = sorted(used, key=lambda path: -used[path])
    named, given_up = (_named(some) for some in (plans[:MOST], plans[MOST:]))
    for path in plans[MOST:]:
        path.unlink(missing_ok=True)
    for path in folder.glob("*.so"):
        with contextlib.suppress(OSError):
            # NOTE a library comes before the plan that names it: another process may be about to write that
            forgotten = path.stem in given_up or time.time() - path.stat().st_mtime > _FORGOTTEN_SECONDS
            if path.stem not in named and forgotten:
                path.unlink(missing_ok=True)


def _named(plans: Sequence[Path]) -> set[str]:
    """Libraries of these plans, those that can be read."""
    found: set[str] = set()
    for path in plans:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            found.update(json.loads(path.read_text(encoding="utf-8"))["libraries"])
    return found
