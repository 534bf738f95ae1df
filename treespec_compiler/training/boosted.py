"""Small models that are tuned one after the other, each to what those before it do not guess.

"Collective boost-tuning" of SpecInfer (Miao et al., arXiv 2305.09781, section 3): samples of which a small model says
what the target says are left out for the next one; the trees of all are merged. A sample here is a few tokens of the
target's text behind a root, and not all of it: of a text of a hundred tokens hardly any model guesses all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InvalidOption
from ..user_cache import replacing, write_whole
from .acceptance import acceptance
from .material import Material, card, new_small
from .progress import Milestone, Tell
from .students.protocol import Student
from .texts import Shelf
from .training import Measured, train

LEFT = "left.safetensors"
"""Of a member: which roots the next one learns from."""
MEMBERS = "members.json"


def boost(material: Material, folder: Path, tell: Tell) -> list[Measured]:
    """Train the members in `folder/member-1`, ...; what was measured of the first one, and of all together at the end.

    Raises InvalidOption for samples that are longer than what is measured.
    """
    plan, held_out = material.plan, material.held_out
    sample, depth = plan.boost.sample, plan.small.depth
    if not 1 <= sample <= depth:
        raise InvalidOption(name="sample", got=sample, expected=f"1 to {depth}, the depth that is measured")
    left = [torch.ones(material.learned.read(i).roots, dtype=torch.bool) for i in range(len(material.learned))]
    merged = [torch.zeros(held_out.read(i).roots, depth, dtype=torch.bool) for i in range(len(held_out))]
    together, first = [], list[Measured]()
    for number in range(plan.boost.members):
        place = folder / f"member-{number + 1}"
        student = new_small(material, number)
        shelf = material.learned.counted([covered(each, sample).float() for each in left])

        def tell_of(said: Milestone, number: int = number) -> None:
            stage = f"{said.stage} member {number + 1}"
            tell(Milestone(stage, said.done, said.total, said.note))

        measured = train(student, shelf, held_out, plan.training, place, tell_of)
        student.write(place, card(plan, measured, len(shelf)))
        first = first or measured
        merged = [before | student.hits(held_out.read(i)).long().cumprod(1).bool() for i, before in enumerate(merged)]
        together.append(Measured(plan.training.steps * (number + 1), measured[-1].loss, acceptance(merged)))
        if number + 1 < plan.boost.members:
            left = _left(student, material.learned, left, sample, place / LEFT)
    shown = [
        {"members": n + 1, "tokens_per_step": round(m.held_out.tokens_per_step, 3)} for n, m in enumerate(together)
    ]
    write_whole(folder / MEMBERS, json.dumps(shown, indent=1) + "\n")
    return [*first, *together[1:]]


def covered(left: Tensor, sample: int) -> Tensor:
    """[R] bool: the roots of samples that are left, each with the `sample - 1` behind it."""
    found = left.clone()
    for shift in range(1, sample):
        found[shift:] |= left[: len(left) - shift] if shift < len(left) else False
    return found


def _left(student: Student, learned: Shelf, before: Sequence[Tensor], sample: int, path: Path) -> list[Tensor]:
    """Of each text, the roots whose sample nobody guessed whole yet; kept in a file, for a run that goes on."""
    from safetensors.torch import load_file, save_file

    if not path.exists():
        found = [each & ~_whole(student.hits(learned.read(i))[:, :sample]).cpu() for i, each in enumerate(before)]
        with replacing(path) as temporary:
            save_file({f"{i}": each for i, each in enumerate(found)}, str(temporary))
    kept = load_file(str(path))
    return [kept[f"{i}"] for i in range(len(before))]


def _whole(hits: Tensor) -> Tensor:
    """[R]: whether all guesses are right, those behind the text's end left out."""
    rows, depth = hits.shape
    inside = torch.arange(rows)[:, None] + torch.arange(depth) < rows
    return (hits | ~inside).all(1)
