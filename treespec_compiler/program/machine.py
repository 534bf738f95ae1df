"""What code was compiled for, beside its graph: versions, treespec's own files, machine, kernels, threads."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from ..ir.device import profile
from ..ir.library import defined, fingerprint
from ..ir.registry import kernels
from ..versions import versions

PACKAGE = Path(__file__).parents[1]


def around() -> list[Any]:
    """Versions, machine and kernels. Passes, printers and kernels are treespec's own files."""
    entered = [[name, k.name, str(k.target), k.priority] for name, op in defined().items() for k in kernels(op)]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    machine = [platform.machine(), torch.backends.cpu.get_cpu_capability(), devices]
    packages = versions("torch", "numpy", "sympy", "transformers")
    return [sys.version, str(torch.version.git_version), packages, _own_source(), fingerprint(), entered, machine]


@functools.cache
def _own_source() -> str:
    """Of every file of treespec's: a checkout changes without its version."""
    found = hashlib.sha256()
    for folder, _, names in sorted(os.walk(PACKAGE, followlinks=True)):
        for name in sorted(names):
            if name.endswith((".py", ".cpp", ".h", ".json", ".jinja")) and "demo" not in Path(folder).parts:
                found.update(name.encode() + b"\0" + (Path(folder) / name).read_bytes())
    return found.hexdigest()


def code_name(digest: str, device: torch.device) -> str:
    """Under which the compiled code of a graph is kept."""
    settings = {k: v for k, v in os.environ.items() if k.startswith("TORCHINDUCTOR_") and k not in _ELSEWHERE}
    about = [digest, around(), torch.get_num_threads(), str(device), dict(profile(device).inductor), settings]
    return hashlib.sha256(json.dumps(about, default=str, sort_keys=True).encode()).hexdigest()[:40]


_ELSEWHERE = {"TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS"}
"""Say where and how fast something is compiled, not what."""
