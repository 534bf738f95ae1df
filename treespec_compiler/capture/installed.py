"""Where libraries lie: Python's own, and what is installed, in this environment or in one that it is made over."""

from __future__ import annotations

import site
import sys
import sysconfig
from pathlib import PurePath

STDLIB = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))


def packages() -> tuple[str, ...]:
    """NOTE an environment that sees the packages of another has them on its path, not among its own."""
    own = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    others = [*site.getsitepackages(), site.getusersitepackages()]
    seen = [path for path in sys.path if PurePath(path).name in ("site-packages", "dist-packages")]
    return tuple(dict.fromkeys((*own, *others, *seen)))


INSTALLED = packages()
LIBRARIES = (*STDLIB, *INSTALLED)
