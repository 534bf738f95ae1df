"""One conversion at a time in a process.

Dynamo, AOTAutograd and Inductor keep their state in module globals and may not run in two threads at once; torch guards
its own compilations with a lock of Dynamo's. Capture, the passes and the lowering hold the same one, so that neither
another conversion nor a `torch.compile` of the user's runs meanwhile. Programs that are made run without it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

_OWN = threading.RLock()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hold torch's compile lock; the thread that has it may enter again.

    NOTE where Dynamo is not imported nothing of torch's compiles, and its import takes seconds: what imports it, a
    capture or a lowering, enters again.
    """
    with _OWN:
        if "torch._dynamo" not in sys.modules:
            yield
            return
        from torch._dynamo.convert_frame import compile_lock

        with compile_lock:
            yield
