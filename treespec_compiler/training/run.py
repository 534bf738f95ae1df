"""A whole training: prompts, the target's texts, a student, steps, and the draft that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from ..errors import InvalidOption
from ..program.tree_program import TreeProgram
from ..versions import __version__
from .boosted import boost
from .manifest import claim
from .material import DraftPlan, Material, card, new_eagle3, new_parallel, new_small, taps_of_kind
from .progress import Tell, nobody
from .students.protocol import Student
from .texts import Shelf
from .training import Measured, TrainingPlan, train
from .writing import digest, taps_there, write

RUN = "run.json"

Trainer: TypeAlias = Callable[[Material, Path, Tell], list[Measured]]
"""(what there is to learn, where the draft is written, who watches) -> what was measured."""


def train_draft(
    program: TreeProgram,
    prompts: Sequence[Sequence[int]],
    folder: Path,
    plan: DraftPlan | None = None,
    *,
    data: Path | None = None,
    start: nn.Module | None = None,
    tokenizer: Any = None,
    tell: Tell = nobody,
) -> list[Measured]:
    """Train a draft of `plan.kind` for a target, from its own answers to `prompts`, and write it to `folder`.

    Started again with the same arguments it goes on where it was ended, whenever that was, and comes to the same bits.
    `data` (default: a folder in `folder`) holds the target's texts, which several runs may share. `start` is a model of
    transformers to begin with, for small models; `tokenizer` is saved beside these. The last prompts in an order drawn
    by the seed are held out. Raises InvalidOption, and what `generate` raises.
    """
    plan = plan or DraftPlan()
    trainer = KINDS.get(plan.kind)
    if trainer is None:
        raise InvalidOption(name="kind", got=plan.kind, expected=" or ".join(KINDS))
    target = program._model()
    if target is None:
        raise InvalidOption(name="model", got="a module that is gone", expected="one that lives as long as its program")
    data = folder / "data" if data is None else data
    taps = taps_of_kind(program, target, plan)
    there = taps_there(data / "learned")
    if there and not taps:
        taps = there  # written for a head, and as good for what reads tokens alone
    claim(folder / RUN, {**asdict(plan), "version": __version__, "prompts": digest(prompts)}, "out")
    learned, held_out = divided(prompts, plan.training)
    device = program.device
    shelves = [
        Shelf(write(program, part, data / name, taps, plan.writing, tell, stage), device)
        for part, name, stage in (
            (learned, "learned", "the target writes"),
            (held_out, "held-out", "the target writes what is held out"),
        )
    ]
    return trainer(Material(target, program, plan, shelves[0], shelves[1], start, tokenizer), folder, tell)


def divided(prompts: Sequence[Sequence[int]], plan: TrainingPlan) -> tuple[list[list[int]], list[list[int]]]:
    """Different prompts in an order drawn by the seed: those to learn from, and those held out."""
    different = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
    draw = torch.Generator().manual_seed(plan.seed)
    order = torch.randperm(len(different), generator=draw).tolist()
    shuffled = [list(different[i]) for i in order]
    count = min(plan.held_out, len(shuffled) // 2)
    return shuffled[: len(shuffled) - count], shuffled[len(shuffled) - count :]


def _alone(make: Callable[[Material], Student]) -> Trainer:
    """One student, in the run's own folder."""

    def trainer(material: Material, folder: Path, tell: Tell) -> list[Measured]:
        student, plan = make(material), material.plan
        measured = train(student, material.learned, material.held_out, plan.training, folder, tell)
        student.write(folder, card(plan, measured, len(material.learned)))
        return measured

    return trainer


KINDS: dict[str, Trainer] = {
    "eagle3": _alone(new_eagle3),
    "small": _alone(new_small),
    "parallel": _alone(new_parallel),
    "boosted": boost,
}
