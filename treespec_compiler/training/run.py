"""A whole training: prompts, the target's texts, a student, steps, and the draft that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidOption
from ..passes.tap import PREFIX
from ..program.tree_program import TreeProgram
from ..versions import __version__
from .manifest import claim
from .progress import Tell, nobody
from .students.eagle3 import eagle3
from .students.heads import HeadPlan, HeadSizes, commonest
from .students.parallel import parallel
from .students.protocol import Student
from .students.small import SmallPlan, SmallStudent, small_model
from .texts import Shelf
from .training import Measured, TrainingPlan, train
from .writing import WritingPlan, taps_there, write

RUN = "run.json"


@dataclass(frozen=True)
class DraftPlan:
    """What is trained, and how."""

    kind: str = "eagle3"
    writing: WritingPlan = field(default_factory=WritingPlan)
    training: TrainingPlan = field(default_factory=TrainingPlan)
    head: HeadPlan = field(default_factory=HeadPlan)
    small: SmallPlan = field(default_factory=SmallPlan)


@dataclass(frozen=True)
class Material:
    """What a student is made of and learns from."""

    target: nn.Module
    program: TreeProgram
    plan: DraftPlan
    learned: Shelf
    held_out: Shelf
    start: nn.Module | None
    """A model to begin with, for kinds that may."""
    tokenizer: Any


Maker = Callable[[Material], Student]


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
    make = KINDS.get(plan.kind)
    if make is None:
        raise InvalidOption(name="kind", got=plan.kind, expected=" or ".join(KINDS))
    target = program._model()
    if target is None:
        raise InvalidOption(name="model", got="a module that is gone", expected="one that lives as long as its program")
    data = folder / "data" if data is None else data
    taps = _taps(program, target, plan)
    there = taps_there(data / "learned")
    if there and not taps:
        taps = there  # written for a head, and as good for what reads tokens alone
    claim(folder / RUN, {**asdict(plan), "version": __version__, "data": str(data)}, "out")
    learned, held_out = divided(prompts, plan.training)
    device = program.device
    shelves = [
        Shelf(write(program, part, data / name, taps, plan.writing, tell, stage), device)
        for part, name, stage in (
            (learned, "learned", "the target writes"),
            (held_out, "held-out", "the target writes what is held out"),
        )
    ]
    material = Material(target, program, plan, shelves[0], shelves[1], start, tokenizer)
    student = make(material)
    measured = train(student, shelves[0], shelves[1], plan.training, folder, tell)
    student.write(folder, about(plan, measured, len(shelves[0])))
    return measured


def divided(prompts: Sequence[Sequence[int]], plan: TrainingPlan) -> tuple[list[list[int]], list[list[int]]]:
    """Different prompts in an order drawn by the seed: those to learn from, and those held out."""
    different = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
    draw = torch.Generator().manual_seed(plan.seed)
    order = torch.randperm(len(different), generator=draw).tolist()
    shuffled = [list(different[i]) for i in order]
    count = min(plan.held_out, len(shuffled) // 2)
    return shuffled[: len(shuffled) - count], shuffled[len(shuffled) - count :]


def about(plan: DraftPlan, measured: Sequence[Measured], texts: int) -> Mapping[str, Any]:
    """What a card says of how a draft came to be."""
    first, last = measured[0].held_out, measured[-1].held_out
    return {
        "treespec": __version__,
        "plan": asdict(plan),
        "texts": texts,
        "tokens_per_step_before": round(first.tokens_per_step, 3),
        "tokens_per_step": round(last.tokens_per_step, 3),
        "accepted_by_depth": [round(share, 3) for share in last.by_depth],
        "held_out_places": last.places,
    }


def embedding_of(target: nn.Module) -> Tensor:
    """[ids, h]. Raises InvalidOption where the target does not say which of its weights it is."""
    find = getattr(target, "get_input_embeddings", None)
    found = getattr(find() if callable(find) else None, "weight", None)
    if not isinstance(found, Tensor):
        got, fix = f"{type(target).__name__} without get_input_embeddings()", "Train a draft of kind small."
        raise InvalidOption(name="model", got=got, expected="a target that says where its embeddings are", fix=fix)
    return found.detach()


def _output_of(target: nn.Module, sizes: HeadSizes) -> Tensor | None:
    """[vocab, h] of the target's head, where it says that it has one of this shape."""
    find = getattr(target, "get_output_embeddings", None)
    found = getattr(find() if callable(find) else None, "weight", None)
    shape = (sizes.vocab, sizes.width)
    return found.detach() if isinstance(found, Tensor) and tuple(found.shape) == shape else None


def _taps(program: TreeProgram, target: nn.Module, plan: DraftPlan) -> list[str]:
    """What the student reads of the target."""
    if plan.kind not in HEADS:
        return []
    return [f"{PREFIX}{k}" for k in HeadSizes.of(program, embedding_of(target), plan.head).taps]


def _eagle3(material: Material) -> Student:
    return eagle3(*_head(material))


def _parallel(material: Material) -> Student:
    return parallel(*_head(material))


def _head(material: Material) -> tuple[HeadSizes, Tensor, Tensor | None, Tensor | None, HeadPlan, int]:
    plan, embedding = material.plan, embedding_of(material.target)
    sizes = HeadSizes.of(material.program, embedding, plan.head)
    ids = commonest(material.learned.answers(), plan.head.vocabulary, sizes.vocab)
    return sizes, embedding, _output_of(material.target, sizes), ids, plan.head, plan.training.seed


def _small(material: Material) -> Student:
    plan, program = material.plan, material.program
    context = program.max_context or 2048
    model = material.start or small_model(plan.small, program.vocab_size, context, plan.training.seed)
    return SmallStudent(model, program.device, plan.small.depth, material.tokenizer)


KINDS: dict[str, Maker] = {"eagle3": _eagle3, "parallel": _parallel, "small": _small}
HEADS = {"eagle3", "parallel"}
"""Kinds that read the target's hidden states."""
