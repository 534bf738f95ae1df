"""Tables of whole numbers that are sums of places, such as i - j, or distances: they are read as what they are.

What a table holds is known by value alone; of a sum of places the closed form is known, in any context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PlaceSum:
    """A table of whole numbers, `first + sum(step[d] * place[d])`, or `sign` times what that is without its own."""

    first: int
    steps: tuple[int, ...]
    dtype: str
    device: str
    sign: int = 0

    def text(self, slices: Sequence[str], sizes: Sequence[int]) -> str:
        """Code that makes the part of it that the slices cut."""
        many = len(sizes)
        kind = f"dtype=_treespec_torch.{self.dtype}, device={self.device!r}"
        if many == 1:
            last = self.first + self.steps[0] * sizes[0]
            return f"_treespec_torch.arange({self.first}, {last}, {self.steps[0]}, {kind})[{slices[0]}]"
        terms: list[str] = []
        for d, (step, cut, size) in enumerate(zip(self.steps, slices, sizes, strict=True)):
            index = ", ".join(":" if e == d else "None" for e in range(many))
            if step or size > 1:
                terms.append(f"{step} * _treespec_torch.arange({size}, {kind})[{cut}][{index}]")
        total = f"({' + '.join(terms)} + {self.first})"
        return f"({self.sign} * {total}.abs())" if self.sign else total


def place_sum(made: Sequence[Tensor]) -> PlaceSum | None:
    """What all these tables are, if each is the same sum of places, or the same distance of two of them; those of one
    column count by one.
    """
    one = made[0]
    if one.dtype not in (torch.int64, torch.int32) or not one.numel():
        return None
    kind = (str(one.dtype).removeprefix("torch."), str(one.device))
    varied = [d for d, size in enumerate(one.shape) if size > 1]
    corner = [0] * one.dim()
    first = int(one[tuple(corner)])
    ends = [int(one[(*corner[:d], 1, *corner[d + 1 :])]) - first if d in varied else 0 for d in range(one.dim())]
    found = [PlaceSum(first, tuple(ends), *kind)]
    if len(varied) == 2 and first == 0:
        away = tuple((d == varied[0]) - (d == varied[1]) for d in range(one.dim()))
        found += [PlaceSum(0, away, *kind, sign=sign) for sign in (1, -1)]
    if not varied or (len(varied) == 1 and ends[varied[0]] != 1) or not any(ends):
        return None
    return next((each for each in found if all(torch.equal(t, _made_of(each, t)) for t in made)), None)


def _made_of(steps: PlaceSum, like: Tensor) -> Tensor:
    """The table of the steps, as large as another."""
    whole = torch.full((), steps.first, dtype=torch.int64, device=like.device)
    for d, (step, size) in enumerate(zip(steps.steps, like.shape, strict=True)):
        places = torch.arange(size, device=like.device) * step
        whole = whole + places.view([-1 if e == d else 1 for e in range(like.dim())])
    return (steps.sign * whole.abs() if steps.sign else whole).to(like.dtype)
