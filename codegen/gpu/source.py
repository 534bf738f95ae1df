"""Generated kernel source as real files: Triton reads a kernel's source from its file, and so can a person.

A file is `kernels/<op>-<hash>.py` below the cache directory. The hash covers the spec, the source and the versions of
treespec, torch and triton, so every file has one right content, and one that holds something else is written again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from treespec_compiler.logs import logger
from treespec_compiler.user_cache import cache_dir, write_whole
from treespec_compiler.versions import versions

log = logger(__name__)

_LOADED: dict[str, ModuleType] = {}
_LOCK = threading.Lock()


def source_hash(text: str) -> str:
    """The identity of generated source, in its header and its file's name."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def kernel_versions() -> dict[str, str]:
    """What a compiled kernel depends on besides its source."""
    return versions("torch", "triton")


def header(op: str, key: Mapping[str, object], text: str) -> str:
    """Comment lines: what the kernel is for, what made it, and that edits are lost."""
    spec = ", ".join(f"{name}={value}" for name, value in key.items())
    made_by = ", ".join(f"{name} {version}" for name, version in kernel_versions().items())
    return (
        f"# treespec {op}: generated, do not edit.\n"
        f"# spec:     {spec}\n"
        f"# versions: {made_by}\n"
        f"# source:   sha256 {source_hash(text)}\n"
    )


def whole_source(op: str, key: Mapping[str, object], text: str) -> str:
    """What a file holds: the header, then the source."""
    return header(op, key, text) + "\n" + text


def write(op: str, key: Mapping[str, object], text: str) -> Path:
    """The file of this source; written where the cache has none. Several processes may do so at once."""
    whole = whole_source(op, key, text)
    name = f"{op}-{source_hash(whole)}.py"
    try:
        return _write(cache_dir() / "kernels" / name, whole)
    except OSError as error:
        folder = Path(tempfile.mkdtemp(prefix="treespec-kernels-"))
        log.warning("the cache cannot be written (%s), generated kernels go to %s", error, folder)
        return _write(folder / name, whole)


def _write(path: Path, whole: str) -> Path:
    """Never leaves a part of a file under `path`, and replaces one that holds something else."""
    try:
        if path.read_text(encoding="utf-8") == whole:
            return path
    except (OSError, UnicodeDecodeError):
        pass
    write_whole(path, whole)
    return path


def load(op: str, key: Mapping[str, object], text: str) -> ModuleType:
    """The module of this source, imported once a process.

    `op` names the file, `key` is the spec as its header shows it, `text` is the source below the header.
    """
    name = f"treespec_kernels.{op}_{source_hash(whole_source(op, key, text))}"
    with _LOCK:
        module = _LOADED.get(name)
        if module is None:
            module = _LOADED[name] = _import(name, write(op, key, text))
        return module


def _import(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # what pickling and inspect look a function's module up in
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
