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
from ..mesh import Mesh

T = TypeVar("T")

TIMEOUT = datetime.timedelta(minutes=10)
"""How long a rank waits for the others: for the slowest to compile, say. A rank that is gone is noticed at once."""


@dataclass(frozen=True)
class Ranks:
    """The processes that run one program together, this one among them."""

    mesh: Mesh
    rank: int
    data: Any
    """The process group that graphs reduce and gather in: of the ranks that share this one's stage."""
    whole: Any
    """One of all ranks, which hand to each other what goes from stage to stage."""
    control: Any
    """One of CPU tensors, for what rank 0 tells the others."""
    led: list[Any] = field(default_factory=list)
    """Of rank 0: by whom the others are led now, the innermost last."""

    @property
    def size(self) -> int:
        return self.mesh.ranks

    def tell(self, message: object) -> None:
        """Rank 0 to all others, which `hear` it. Raises RuntimeError where one of them is gone."""
        dist.broadcast_object_list([message], src=0, group=self.control, device=torch.device("cpu"))

    def hear(self) -> Any:
        """What rank 0 tells. Raises RuntimeError where it is gone."""
        heard: list[Any] = [None]
        dist.broadcast_object_list(heard, src=0, group=self.control, device=torch.device("cpu"))
        return heard[0]

    def agree(self, values: Mapping[str, str], partly: bool = False) -> None:
        """Raises `RanksDiffer` on every rank where one of them has other values than the first one that has any.

        `partly`: some names are those of a few ranks; else all ranks must have the same ones.
        """
        found = self._gather(dict(values))
        first: dict[str, int] = {}
        for rank, theirs in enumerate(found):
            for name in theirs:
                first.setdefault(name, rank if partly else 0)
        for rank, theirs in enumerate(found):
            said = theirs if partly else found[0] | theirs
            names = [name for name in said if found[first[name]].get(name) != theirs.get(name)]
            if names:
                raise RanksDiffer(rank=rank, names=names, first=first[names[0]])

    def largest(self, value: int) -> int:
        """The largest value that a rank has."""
        return max(self._gather(value))

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


_JOINED: dict[Mesh, Ranks] = {}


def joined(mesh: Mesh) -> Ranks:
    """This process as one of a mesh's ranks: the processes that torch.distributed has, or that torchrun started.

    Raises `InvalidOption` where there are others or none.
    """
    known = _JOINED.get(mesh)
    if known is None or not dist.is_initialized():
        known = _JOINED[mesh] = _join(mesh)
    return known


def _join(mesh: Mesh) -> Ranks:
    size = mesh.ranks
    if not dist.is_available():
        raise _wrong_mesh(mesh, "a torch without torch.distributed")
    if not dist.is_initialized():
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise _wrong_mesh(mesh, "one process")
        if int(os.environ["WORLD_SIZE"]) != size:
            raise _wrong_mesh(mesh, f"{os.environ['WORLD_SIZE']} processes")
        dist.init_process_group(_backend(), timeout=TIMEOUT)
        _JOINED.clear()
    if dist.get_world_size() != size:
        raise _wrong_mesh(mesh, f"{dist.get_world_size()} processes")
    rank = dist.get_rank()
    whole = dist.new_group(timeout=TIMEOUT)
    # NOTE every rank takes part in making every group.
    groups = [dist.new_group(list(mesh.ranks_of(stage)), timeout=TIMEOUT) for stage in range(mesh.pp) if mesh.pp > 1]
    data = groups[mesh.stage(rank)] if groups else whole
    control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    _enter(mesh.group, data)
    led = next((others.led for others in _JOINED.values()), [])  # the same processes, whatever their mesh
    return Ranks(mesh, rank, data, whole, control, led)


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def _wrong_mesh(mesh: Mesh, got: str) -> InvalidOption:
    size = mesh.ranks
    fix = f"Start the ranks with `torchrun --nproc-per-node {size} ...`, and call the same functions on each."
    return InvalidOption(name="mesh", got=f"{mesh} in {got}", expected=f"{size} processes", fix=fix)


def _enter(name: Any, group: Any) -> None:
    """Let functional collectives find the group under this name."""
    from torch._C._distributed_c10d import _register_process_group, _unregister_process_group

    try:
        _register_process_group(name, group)
    except RuntimeError:  # of ranks that were joined before, and left
        _unregister_process_group(name)
        _register_process_group(name, group)
