"""One conversion at a time in a process.

Dynamo, AOTAutograd and Inductor keep their state in module globals and may not run in two threads at once; torch guards
its own compilations with a lock of Dynamo's. Capture, the passes and the lowering hold the same one, so that neither
another conversion nor a `torch.compile` of the user's runs meanwhile. Programs that are made run without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hold torch's compile lock; the thread that has it may enter again."""
    from torch._dynamo.convert_frame import compile_lock

    with compile_lock:
        yield
