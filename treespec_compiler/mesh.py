"""Which processes run a program together, and what each of them is for: the text of option `mesh`, read."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InvalidOption

GROUP = "treespec_tp"
"""Name, in graphs, of the group of ranks that share every layer; whoever runs them enters a process group under it."""

_AXES = ("tp", "pp")


@dataclass(frozen=True)
class Mesh:
    """`tp` ranks share every layer of a stage, of which there are `pp`. Ranks are numbered from the last stage on.

    NOTE rank 0 is spoken to: it holds the last stage, whose logits it judges, so that logits never travel.
    """

    tp: int = 1
    pp: int = 1

    @classmethod
    def parse(cls, text: object) -> Mesh:
        """Of "tp=2", "pp=2" or both, with a comma; None is one rank. Raises `InvalidOption`."""
        if text is None:
            return cls()
        sizes: dict[str, int] = {}
        for part in text.split(",") if isinstance(text, str) else [""]:
            axis, _, number = (word.strip() for word in part.partition("="))
            if axis not in _AXES or axis in sizes or not number.isdecimal() or int(number) < 1:
                fix = "Ranks that share layers (tp) and pipeline stages (pp) are there; draft ranks are not."
                raise InvalidOption(name="mesh", got=text, expected="'tp=N', 'pp=M' or 'tp=N,pp=M'", fix=fix)
            sizes[axis] = int(number)
        return cls(**sizes)

    def __str__(self) -> str:
        sizes = [f"{axis}={getattr(self, axis)}" for axis in _AXES if getattr(self, axis) > 1]
        return ",".join(sizes) or "tp=1"

    @property
    def ranks(self) -> int:
        """How many processes there are."""
        return self.tp * self.pp

    @property
    def group(self) -> str:
        """As `GROUP`; meshes of as many processes with other groups have other names for theirs."""
        return GROUP if self.pp == 1 else f"{GROUP}{self.tp}"

    def stage(self, rank: int) -> int:
        """Which stage this rank runs; the first one has the tokens, the last one the logits."""
        return self.pp - 1 - rank // self.tp

    def share(self, rank: int) -> int:
        """Which of the `tp` shares of its stage this rank has."""
        return rank % self.tp

    def ranks_of(self, stage: int) -> range:
        """The ranks that run this stage."""
        first = (self.pp - 1 - stage) * self.tp
        return range(first, first + self.tp)
