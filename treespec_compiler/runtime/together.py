"""A generation that the ranks of a mesh run together: every rank asks for it, rank 0 leads, and all get its result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

from ..capture.surroundings import not_traced
from ..mesh import Mesh
from ..options import Options
from ..program.leading import Leader, follow, leading, ranks_are_led
from ..program.ranks import Ranks, joined
from ..speculation.drafts.model import is_program
from ..versions import __version__
from .generation import Step
from .output import GenerationOutput
from .settings import Call
from .starting import program_of
from .stats import Stats
from .streams import Stream


def mesh_of(call: Call) -> Mesh:
    """The ranks that the call's program runs on."""
    program = call.model if is_program(call.model) else None
    options: Options | None = call.compiler if program is None else getattr(program, "options", None)
    return Mesh() if options is None else options.shape  # a program of somebody's own may know no options


class Together(Stream):
    """`make(calls)` on rank 0; the others follow it from their first step on, give no steps, and end with its output.

    Raises `RanksDiffer` where arguments, options or weights are not those of rank 0, `RankLost` where a rank ends.
    """

    def __init__(self, calls: Sequence[Call], make: Callable[[list[Call]], Stream]) -> None:
        self._generation = None
        self._output: GenerationOutput | None = None
        self._ranks: Ranks = joined(mesh_of(calls[0]))
        if self._ranks.led:
            raise ranks_are_led()
        self._ranks.agree(said_of(calls))
        # All ranks convert, lower and check the program at the same time: the check runs their collectives.
        self._program = program_of(calls[0], Stats(prompt_tokens=0))
        self._program.check()  # of a program that was given, too: not once rank 0 leads
        self._ranks.agree(self._program.said_of_weights, partly=True)
        self._steps: Stream | None = None
        self._prompt, self._device = calls[0].prompt, calls[0].device
        self.stats, self.tokens = Stats(prompt_tokens=len(calls[0].prompt)), []
        self._ended = False
        if self._ranks.rank == 0:
            self._leader = Leader(self._ranks)
            with leading(self._program, self._leader):
                self._steps = make(list(calls))
            self.stats, self.tokens = self._steps.stats, self._steps.tokens

    @not_traced
    def __next__(self) -> Step:
        if self._ended:
            raise StopIteration
        if self._steps is None:
            self._ended = True
            self._take(cast(GenerationOutput, follow(self._program, self._ranks)))
            raise StopIteration
        try:
            with leading(self._program, self._leader):
                return next(self._steps)
        except StopIteration:
            self.close()
            raise
        except BaseException:
            self._ended = True
            raise

    def exhaust(self) -> None:
        """Step by step: each step of rank 0 is led, the others follow to the end."""
        for _ in self:
            pass

    def _take(self, output: GenerationOutput) -> None:
        self._output, self.stats = output, output.stats
        self.tokens = output.sequences[0].tolist()[len(self._prompt) :]

    def close(self) -> None:
        """Rank 0 ends the generation on all ranks."""
        if not self._ended:
            self._ended = True
            if self._steps is not None:
                self._steps.close()
                self._leader.done(self._steps.output())

    def output(self) -> GenerationOutput:
        if self._output is not None:
            return self._output
        return super().output() if self._steps is None else self._steps.output()

    def __del__(self) -> None:
        """A stream that is dropped ends where it is; the other ranks notice when the process does."""


def said_of(calls: Sequence[Call], more: Mapping[str, object] | None = None) -> dict[str, str]:
    """What must be the same on all ranks, by the names of arguments; what cannot be compared counts by its type."""
    found = {"treespec": __version__, "number of prompts": str(len(calls))}
    found |= {name: str(value) for name, value in (more or {}).items()}
    for entry in fields(calls[0]):
        found[entry.name] = _text([getattr(call, entry.name, None) for call in calls])
    return found


def _text(values: Sequence[Any]) -> str:
    shown = "; ".join(repr(v) if _plain(v) else type(v).__name__ for v in values)
    return hashlib.sha256(shown.encode()).hexdigest()


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, Options))
