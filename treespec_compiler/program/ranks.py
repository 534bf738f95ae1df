"""The processes of a mesh: joined once, and known to graphs by the name of their group."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import InvalidOption, RankFailed, RankLost, RanksDiffer
from ..passes.sharding.mesh import GROUP

T = TypeVar("T")

TIMEOUT = datetime.timedelta(minutes=10)
"""How long a rank waits for the others: for the slowest to compile, say. A rank that is gone is noticed at once."""


@dataclass(frozen=True)
class Ranks:
    """The processes that run one program together, this one among them."""

    rank: int
    size: int
    data: Any
    """The process group that graphs reduce and gather in."""
    control: Any
    """One of CPU tensors, for what rank 0 tells the others."""
    led: list[Any] = field(default_factory=list)
    """Of rank 0: by whom the others are led now, the innermost last."""

    def tell(self, message: object) -> None:
        """Rank 0 to all others, which `hear` it. Raises RuntimeError where one of them is gone."""
        dist.broadcast_object_list([message], src=0, group=self.control, device=torch.device("cpu"))

    def hear(self) -> Any:
        """What rank 0 tells. Raises RuntimeError where it is gone."""
        heard: list[Any] = [None]
        dist.broadcast_object_list(heard, src=0, group=self.control, device=torch.device("cpu"))
        return heard[0]

    def agree(self, values: Mapping[str, str]) -> None:
        """Raises `RanksDiffer` on every rank where one of them has other values than rank 0."""
        found = self._gather(dict(values))
        for rank, theirs in enumerate(found):
            names = [name for name in found[0] | theirs if found[0].get(name) != theirs.get(name)]
            if names:
                raise RanksDiffer(rank=rank, names=names)

    def each(self, do: Callable[[], T]) -> T:
        """What `do` gives here, once it is done on every rank. Where it fails on one, that one raises its error, and
        all others raise `RankFailed`, instead of waiting for it.
        """
        try:
            made = do()
        except Exception as error:
            self._gather(f"{type(error).__name__} ({str(error).rstrip('.')})")
            raise
        for rank, problem in enumerate(self._gather(None)):
            if problem is not None:
                raise RankFailed(rank=rank, problem=problem)
        return made

    def _gather(self, value: object) -> list[Any]:
        """Every rank's, by rank. Raises `RankLost`."""
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, value, group=self.control)
        except RuntimeError as error:
            raise RankLost(rank=self.rank, size=self.size, step=0) from error
        return found


_JOINED: dict[int, Ranks] = {}


def joined(size: int) -> Ranks:
    """This process as one of `size` ranks: the processes that torch.distributed has, or that torchrun started.

    Raises `InvalidOption` where there are others or none.
    """
    known = _JOINED.get(size)
    if known is None or not dist.is_initialized():
        known = _JOINED[size] = _join(size)
    return known


def _join(size: int) -> Ranks:
    if not dist.is_available():
        raise _wrong_mesh(size, "a torch without torch.distributed")
    if not dist.is_initialized():
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise _wrong_mesh(size, "one process")
        if int(os.environ["WORLD_SIZE"]) != size:
            raise _wrong_mesh(size, f"{os.environ['WORLD_SIZE']} processes")
        dist.init_process_group(_backend(), timeout=TIMEOUT)
    if dist.get_world_size() != size:
        raise _wrong_mesh(size, f"{dist.get_world_size()} processes")
    data = dist.new_group(timeout=TIMEOUT)
    control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    _enter(GROUP, data)
    return Ranks(dist.get_rank(), size, data, control)


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def _wrong_mesh(size: int, got: str) -> InvalidOption:
    fix = f"Start the ranks with `torchrun --nproc-per-node {size} ...`, and call the same functions on each."
    return InvalidOption(name="mesh", got=f"tp={size} in {got}", expected=f"{size} processes", fix=fix)


def _enter(name: Any, group: Any) -> None:
    """Let functional collectives find the group under this name."""
    from torch._C._distributed_c10d import _register_process_group, _unregister_process_group

    try:
        _register_process_group(name, group)
    except RuntimeError:  # of ranks that were joined before, and left
        _unregister_process_group(name)
        _register_process_group(name, group)
