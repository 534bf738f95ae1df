"""What this process holds in memory that only it can give back; pages of mapped files are the system's to take."""

from __future__ import annotations

import threading
import time
from pathlib import Path


def anonymous() -> int:
    """Bytes of its anonymous pages."""
    rows = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(row for row in rows if row.startswith("RssAnon:")).split()[1])


class Highest(threading.Thread):
    """The most of them that was seen, looked at all the time from `start` on."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.over = False

    def run(self) -> None:
        while not self.over:
            self.bytes = max(self.bytes, anonymous())
            time.sleep(0.001)

    def end(self) -> int:
        """The most."""
        self.over = True
        self.join()
        return self.bytes
