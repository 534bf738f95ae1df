"""Files of weights into memory: pieces by a few threads, past the page cache; what fails is tried again, then told."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from ..errors import WeightsUnreadable

ALIGNMENT = 4096
"""Of addresses, file offsets and lengths that are read past the page cache."""
THREADS = 4
PIECE = 8 << 20
"""Bytes of one read."""
ATTEMPTS = 3
"""How often a read that fails or gives nothing is made."""


def read_file(path: Path, length: int, memory: Tensor, pool: ThreadPoolExecutor) -> None:
    """Fill the beginning of `memory`, uint8 at an aligned address, with so many bytes of a file.

    The calling thread reads the first piece itself: a layer of one piece waits for no other thread to wake up. Raises
    `WeightsUnreadable`.
    """
    try:
        file, cached = _open(path)
    except OSError as error:
        raise WeightsUnreadable(path=str(path), offset=0, problem=str(error)) from error
    try:
        data = memory.numpy().data
        pieces = [(start, min(PIECE, length - start)) for start in range(0, length, PIECE)]
        reads = [pool.submit(_read_piece, file, path, data, *piece) for piece in pieces[1:]]
        try:
            _read_piece(file, path, data, *pieces[0])
        finally:
            for read in reads:
                read.exception()  # all of them end before the file is closed
        for read in reads:
            read.result()
        if cached:
            os.posix_fadvise(file, 0, length, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def _open(path: Path) -> tuple[int, bool]:
    """The file, and whether what is read of it goes through the page cache: where the file system can, it does not, as
    cached copies of weights would take the memory that is spared.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT), False
    except OSError:
        return os.open(path, os.O_RDONLY), True


def _read_piece(file: int, path: Path, memory: memoryview, start: int, length: int) -> None:
    at, failures = start, 0
    while at < start + length:
        # After a short read the rest begins at a whole page again, as O_DIRECT needs it.
        aligned = at - at % ALIGNMENT
        try:
            got = os.preadv(file, [memory[aligned : start + length]], aligned)
            problem = "the end of the file"
        except OSError as error:
            got, problem = 0, str(error)
        if aligned + got > at:
            at, failures = aligned + got, 0
            continue
        failures += 1
        if failures == ATTEMPTS:
            raise WeightsUnreadable(path=str(path), offset=at, problem=problem)
