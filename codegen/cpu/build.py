"""Builds the C++ kernels once for each machine and torch, with the system's compiler, into the user's cache."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from treespec_compiler.logs import logger
from treespec_compiler.user_cache import cache_dir, replacing

log = logger(__name__)

SOURCES = tuple(Path(__file__).with_name(name) for name in ("ops.cpp", "products_of_blocks.cpp", "products.cpp"))
"""Compiled side by side, those that take longest first: torch's headers are 13 of the 20 s of the first one."""
TIMEOUT = 600

_building = threading.Lock()


class BuildError(Exception):
    """Why there is no library."""


def compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("no C++ compiler found (looked for $CXX, g++, clang++, c++)")


def flags() -> list[str]:
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return ["-std=c++20", "-O3", native, "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC", abi]


def folders() -> tuple[list[str], list[str]]:
    """Of torch's headers, and of its libraries."""
    # NOTE imported where something is built only: a CUDA build of torch logs there that a machine has no GPU.
    from torch.utils import cpp_extension

    return cpp_extension.include_paths(), cpp_extension.library_paths()


def openmp() -> list[str]:
    """torch's own OpenMP runtime where it brings one: two runtimes in a process would be two pools of threads."""
    found = [p for folder in folders()[1] for p in sorted(Path(folder).glob("libgomp*.so*"))]
    return [str(p) for p in found[:1]]


def cpu_flags() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def compiling(cxx: str, source: Path, output: Path) -> list[str]:
    """The command that makes an object of a source."""
    return [cxx, *flags(), *(f"-isystem{p}" for p in folders()[0]), "-c", str(source), "-o", str(output)]


def linking(cxx: str, objects: Sequence[Path], output: Path) -> list[str]:
    """The command that makes the library of them."""
    links = [f"-L{p}" for p in folders()[1]]
    return [cxx, *flags(), "-shared", *map(str, objects), "-o", str(output), *openmp(), *links, "-lc10", "-ltorch_cpu"]


def key(cxx: str) -> str:
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, timeout=TIMEOUT).stdout
    sources = [p.read_text() for p in sorted(Path(__file__).parent.iterdir()) if p.suffix in (".cpp", ".h")]
    parts = [*sources, torch.__version__, cxx, version, *flags(), platform.machine(), cpu_flags()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def build() -> Path:
    """The library's path; compiles where the cache has none. Several processes may do so at once: the last one wins.

    Threads wait for each other. Raises BuildError.
    """
    with _building:
        return _build()


def _build() -> Path:
    try:
        cxx = compiler()
        path = cache_dir() / "cpu" / f"treespec_cpu_{key(cxx)}.so"
        if path.exists():
            return path
        started = time.perf_counter()
        with replacing(path) as temporary, tempfile.TemporaryDirectory() as folder:
            objects = [Path(folder, source.name).with_suffix(".o") for source in SOURCES]
            with ThreadPoolExecutor(len(SOURCES)) as pool:
                commands = [compiling(cxx, source, to) for source, to in zip(SOURCES, objects, strict=True)]
                list(pool.map(_run, commands))
            _run(linking(cxx, objects, temporary))
        log.info("built %s in %.1f s", path, time.perf_counter() - started)
        return path
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(str(error)) from error


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    if done.returncode:
        raise BuildError(f"{command[0]} failed:\n{done.stderr[-2000:]}")


@functools.cache
def begin() -> None:
    """Build in the background, once a process, what `load` then waits for: a conversion has other work until then.

    Compilers take some 20 to 45 s of the cores. A failure is `load`'s to tell.
    """

    def run() -> None:
        try:
            build()
        except BuildError as error:
            log.debug("the native CPU kernels were not built in the background: %s", error)

    # NOTE a daemon: a conversion that was refused does not wait for kernels that nobody will run
    threading.Thread(target=run, name="treespec C++ kernels", daemon=True).start()


@functools.cache
def load() -> bool:
    """Build if need be and load, once a process. False, with one warning, where that is not possible."""
    try:
        torch.ops.load_library(str(build()))
    except (BuildError, OSError) as error:
        log.warning("no native CPU kernels, the slower ATen ones are used instead: %s", error)
        return False
    return True


def loaded() -> bool:
    """Whether `load` was called and succeeded; never builds."""
    return load.cache_info().currsize > 0 and load()
