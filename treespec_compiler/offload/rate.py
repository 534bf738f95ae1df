"""How fast a folder's disk gives what is read as weights are."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..errors import NoRoomForWeights
from .reading import THREADS, read_file

SAMPLE = 64 << 20
"""Bytes that are written and read; a power of two of pages."""
RUNS = 3


def reading_rate(folder: Path, sample: int = SAMPLE) -> float:
    """Bytes a second, the best of a few runs over a file that is written for it and removed again.

    Raises `NoRoomForWeights`, and OSError where the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if sample > free:
        raise NoRoomForWeights(folder=str(folder), needed=sample, free=free)
    memory = torch.frombuffer(mmap.mmap(-1, sample), dtype=torch.uint8)
    best = 0.0
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp") as file, ThreadPoolExecutor(THREADS) as pool:
        file.write(memory.random_().numpy().data)  # a disk may hold zeros without storing them
        file.flush()
        os.fsync(file.fileno())
        for _ in range(RUNS):
            began = time.perf_counter()
            read_file(Path(file.name), sample, memory, pool)
            best = max(best, sample / (time.perf_counter() - began))
    return best
