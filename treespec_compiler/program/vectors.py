"""Which vector instructions Inductor may use, told without a build of each.

Inductor compiles, links and loads a small library against torch's headers for every set of instructions that the CPU
has, in a fresh cache: five of them, 15 s of a core. What these find out is known by then: the CPU and the system have
the instructions (torch's own checks, which Inductor makes as well), torch was built for the widest of them, and the
compiler knows their flags, which takes it 20 ms to say.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

import torch

from ..logs import logger

log = logger(__name__)

TIMEOUT = 60


def settings() -> dict[str, Any]:
    """Inductor's setting that says so; empty where it is not known, or the user has set one."""
    from torch._inductor import config

    if config.cpp.vec_isa_ok is not None:
        return {}
    named = config.cpp.cxx if isinstance(config.cpp.cxx, (tuple, list)) else (config.cpp.cxx,)
    found = next((path for name in named if name and (path := shutil.which(name))), None)
    return {"cpp.vec_isa_ok": True} if found is not None and _known(found) else {}


@functools.cache
def _known(compiler: str) -> bool:
    from torch._inductor import cpu_vec_isa

    there = set(cpu_vec_isa.x86_isa_checker())
    sets = [isa for isa in cpu_vec_isa.supported_vec_isa_list if set(str(isa).split()) <= there]
    if not sets or torch.backends.cpu.get_cpu_capability() != ("AVX512" if "avx512" in there else "AVX2"):
        return False  # another maker's CPU, or torch uses less than the CPU has
    return takes(compiler, [flag for isa in sets for flag in isa.build_arch_flags().split()])


def takes(compiler: str, flags: Sequence[str]) -> bool:
    """Whether a compiler knows these flags."""
    command = [compiler, *flags, "-fsyntax-only", "-x", "c++", "-"]
    try:
        return not subprocess.run(command, input=b"", capture_output=True, timeout=TIMEOUT).returncode
    except (OSError, subprocess.SubprocessError):
        log.debug("%s cannot be asked", compiler, exc_info=True)
        return False
