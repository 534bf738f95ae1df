"""Open a small store in a process of its own, and print how many bytes it wrote. Arguments: the folder, and "killed"
to be ended by SIGKILL in the middle of the third file.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path

from streams import streaming, weight

from treespec_compiler.offload.store import WeightStore

if sys.argv[2:] == ["killed"]:
    synced, count = os.fsync, itertools.count(1)

    def killed(file: int) -> None:
        if next(count) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        synced(file)

    os.fsync = killed

print(WeightStore(Path(sys.argv[1]), streaming(), "key", weight).written)
