"""Option `offload`: where weights come from that do not stay in memory, and how much may stay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .errors import InvalidOption
from .user_cache import cache_dir

GB = 10**9
MOST_SLOTS = 64
_EXPECTED = "'disk', a mapping such as {'to': 'disk', 'resident_gb': 2.0}, or None"


@dataclass(frozen=True)
class Offload:
    """What `options={"offload": ...}` says: `"disk"` alone, or a mapping of these."""

    to: str = "disk"
    """Where the weights lie that do not stay: files, in `dir`."""
    resident_gb: float | None = None
    """10^9 bytes of weights that may lie in the device's memory, the ring's slots included."""
    ram_gb: float | None = None
    """As `resident_gb`, of the machine's memory, which a CPU's is: the smaller of the two counts. Neither: half of what
    is free now."""
    dir: str | None = None
    """A folder where their files are written, and found again; None: `offload` in the user's cache directory."""
    slots: int | None = None
    """Layers that the ring has room for: one that computes, the others on their way. None: two, and up to four of small
    layers where the budget has room."""

    def __post_init__(self) -> None:
        if self.to != "disk":
            raise InvalidOption(name="offload", got=self.to, expected="'disk'", fix="There is no other place yet.")
        for name in ("resident_gb", "ram_gb"):
            size = getattr(self, name)
            number = isinstance(size, (int, float)) and not isinstance(size, bool)
            if size is not None and not (number and 0 <= size < math.inf):
                raise InvalidOption(name="offload", got=f"{name}={size!r}", expected="0 or more, of 10^9 bytes")
        if self.slots is not None and (type(self.slots) is not int or not 2 <= self.slots <= MOST_SLOTS):
            expected = f"2 to {MOST_SLOTS}, or None: one layer that computes, and one on its way"
            raise InvalidOption(name="offload", got=f"slots={self.slots!r}", expected=expected)
        if self.dir is not None and not isinstance(self.dir, (str, Path)):
            raise InvalidOption(name="offload", got=f"dir={self.dir!r}", expected="a path or None")

    def bytes(self) -> int:
        """That weights may take in memory, as it is now."""
        said = [size for size in (self.resident_gb, self.ram_gb) if size is not None]
        return round(min(said) * GB) if said else _free_memory() // 2

    @property
    def path(self) -> Path:
        return cache_dir() / "offload" if self.dir is None else Path(self.dir)

    @classmethod
    def parse(cls, given: Any) -> Offload | None:
        """What a user writes. Raises `InvalidOption`."""
        if given is None or isinstance(given, cls):
            return given
        if isinstance(given, str):
            return cls(to=given)
        if not isinstance(given, Mapping):
            raise InvalidOption(name="offload", got=given, expected=_EXPECTED)
        known = [field.name for field in fields(cls)]
        unknown = next((name for name in given if name not in known), None)
        if unknown is not None:
            raise InvalidOption(name="offload", got=f"{unknown!r} in it", expected=f"some of {', '.join(known)}")
        return cls(**given)


def _free_memory() -> int:
    """Bytes that processes can still take, page cache included (Linux)."""
    try:
        rows = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(row for row in rows if row.startswith("MemAvailable:")).split()[1])
    except (OSError, StopIteration, ValueError) as error:
        fix = "Say how much may stay: offload={'resident_gb': ...}."
        raise InvalidOption(
            name="offload", got="a system that does not say it", expected="its free memory", fix=fix
        ) from error
