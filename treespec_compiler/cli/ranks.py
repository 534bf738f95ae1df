"""A command that runs as several ranks: started here by torch's elastic launcher, where torchrun has not done it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import TypeVar

from ..mesh import Mesh

T = TypeVar("T")

LOST = 3
"""Exit code where a rank was lost."""


def is_rank() -> bool:
    """Whether this process was started as one of several, by torchrun or by `start_ranks`."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start_ranks(count: int, stopped: int | None = None) -> int:
    """Run this command line again as `count` ranks on this machine; its exit code, 3 where a rank was lost.

    A signal ends all of them; then it is `stopped`, or 128 and the signal's number.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="treespec",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    command = ["-m", "treespec_compiler", *sys.argv[1:]]
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        # NOTE where one rank ended by itself the launcher ends the others, which then were not lost
        codes = (codes - {-signal.SIGTERM}) or codes
        return LOST if LOST in codes or min(codes) < 0 else max(codes)
    except SignalException as error:
        return 128 + int(error.sigval) if stopped is None else stopped
    return 0


def together(mesh: Mesh, do: Callable[[], T]) -> T:
    """What `do` gives on this rank, once all of the mesh have done it. Raises on each of them where it fails on one."""
    if mesh.ranks == 1:
        return do()
    from ..program.ranks import joined

    return joined(mesh).each(do)


def follows() -> bool:
    """Whether this process is a rank that another one leads."""
    return os.environ.get("RANK", "0") != "0"


def quiet_followers() -> None:
    """What a command prints is rank 0's alone; the others speak where something goes wrong."""
    if follows():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - it stays until the process ends
