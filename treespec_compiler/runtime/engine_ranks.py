"""An engine on the ranks of a mesh: rank 0 has its requests and leads, the others run what it tells."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch

from ..errors import InvalidOption, TreespecError
from ..mesh import Mesh
from ..program.leading import Leader, follow, leading, ranks_are_led
from ..program.ranks import Ranks, joined
from ..program.tree_program import TreeProgram

BEAT = 15.0
"""Seconds after which rank 0 speaks where it has nothing to say, so that others wait on, and a lost one is noticed."""


class EngineRanks:
    """This process's part in it. Raises `RanksDiffer` where `said` is not what rank 0 says."""

    def __init__(self, ranks: Ranks, said: Mapping[str, str]) -> None:
        self._ranks = ranks
        ranks.agree(said)
        self.leader: Leader | None = None
        self._over = threading.Event()

    @classmethod
    def of(cls, mesh: Mesh, said: Mapping[str, str]) -> EngineRanks | None:
        """None: one process runs the engine, or somebody leads who made it. Raises `RanksDiffer`."""
        if mesh.ranks == 1:
            return None
        ranks = joined(mesh)
        if ranks.led:
            if ranks.led[-1].inside:
                return None
            raise ranks_are_led()
        return cls(ranks, said)

    @property
    def rank(self) -> int:
        return self._ranks.rank

    @property
    def error(self) -> Exception | None:
        """What ended the engine on all ranks."""
        return None if self.leader is None else self.leader.error

    def agree(self, program: TreeProgram) -> None:
        """From now on rank 0 leads. Raises `RanksDiffer` where weights are not those that it has."""
        self._ranks.agree(program.said_of_weights, partly=True)
        if self.rank == 0:
            self.leader = Leader(self._ranks)

    def leading(self, program: TreeProgram) -> AbstractContextManager[None]:
        """While it is open, rank 0's calls of the program are run by all."""
        return contextlib.nullcontext() if self.leader is None else leading(program, self.leader)

    def follow(self, program: TreeProgram) -> None:
        """Run what rank 0 tells, until it closes the engine. Raises what ended it there, and `RankLost`."""
        if self.leader is not None:
            fix = "It has the requests, and leads."
            raise InvalidOption(name="mesh", got="rank 0 that follows", expected="another rank", fix=fix)
        with torch.inference_mode():
            follow(program, self._ranks)

    def beat(self, lock: AbstractContextManager[object], lost: Callable[[Exception], None]) -> None:
        """Speak to the others from time to time, while nobody holds `lock`, until `end`; `lost`: why that failed."""
        leader = self.leader
        if leader is None:
            return

        def speak() -> None:
            while not self._over.wait(BEAT):
                try:
                    with lock:
                        if not self._over.is_set():
                            leader.tell("still")
                except Exception as error:
                    lost(error)
                    return

        threading.Thread(target=speak, name="treespec ranks", daemon=True).start()

    def end(self) -> None:
        """The others return from `follow`."""
        self._over.set()
        if self.leader is not None:
            with contextlib.suppress(TreespecError):  # a rank that is gone need not be told
                self.leader.done(None)
