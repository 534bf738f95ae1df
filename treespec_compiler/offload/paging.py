"""Memory given back to the system: pages of mapped weights once they were read, and what is free in the heap.

A module's tensors are often views of a mapped file (safetensors). Summing them up brings the whole file into memory;
where the program reads copies of its own, it stays there for nothing.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from ..logs import logger

log = logger(__name__)

_PAGE_OUT = 21
"""MADV_PAGEOUT (Linux 5.4). NOTE unlike MADV_DONTNEED it loses nothing that was written to a private mapping."""


def page_out(tensors: Iterable[Tensor]) -> None:
    """Ask the system to take back the pages of those that lie in mapped files, and leave all others alone.

    The next read brings them back from the file.
    """
    starts, ends = mapped_files()
    for tensor in tensors:
        first = tensor.data_ptr()
        after = first + tensor.numel() * tensor.element_size()
        at = bisect.bisect_right(starts, first) - 1
        if at < 0 or after > ends[at]:
            continue
        begin = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages: others share those at the edges
        length = after // mmap.PAGESIZE * mmap.PAGESIZE - begin
        if length > 0 and _madvise(begin, length) != 0:
            log.debug("the system does not take back %d bytes of mapped weights", length)
            return


def trim() -> None:
    """Give back what packing and writing weights left free in the heap, where the C library can (glibc)."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def mapped_files() -> tuple[list[int], list[int]]:
    """Where mapped files begin and end in this process's memory, in order; nothing where the system does not say."""
    try:
        rows = [line.split() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return [], []
    ranges = [row[0].split("-") for row in rows if len(row) > 5 and row[4] != "0"]
    return [int(first, 16) for first, _ in ranges], [int(end, 16) for _, end in ranges]


def _madvise(begin: int, length: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _PAGE_OUT))
