"""Generated Triton kernels. Importing this imports no triton; kernels are generated and compiled when first used."""

from __future__ import annotations

import functools
import importlib.util


@functools.cache
def triton_installed() -> bool:
    """Whether triton can be imported; does not import it."""
    return importlib.util.find_spec("triton") is not None
