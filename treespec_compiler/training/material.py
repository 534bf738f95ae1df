"""What a student is made of and learns from, by kind of draft."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import InvalidOption
from ..ir.outputs import PREFIX
from ..program.tree_program import TreeProgram
from ..versions import __version__
from .students.eagle3 import eagle3
from .students.heads import HeadPlan, HeadSizes, commonest
from .students.parallel import parallel
from .students.protocol import Student
from .students.small import SmallPlan, SmallStudent, small_model
from .texts import Shelf
from .training import Measured, TrainingPlan
from .writing import WritingPlan

HEADS = {"eagle3", "parallel"}
"""Kinds that read the target's hidden states."""


@dataclass(frozen=True)
class BoostPlan:
    """Of several small models, each of which learns what those before it do not guess."""

    members: int = 3
    sample: int = 3
    """Tokens of a sample: one that a member guesses whole is left out for those after it. At most `SmallPlan.depth`."""


@dataclass(frozen=True)
class DraftPlan:
    """What is trained, and how."""

    kind: str = "eagle3"
    writing: WritingPlan = field(default_factory=WritingPlan)
    training: TrainingPlan = field(default_factory=TrainingPlan)
    head: HeadPlan = field(default_factory=HeadPlan)
    small: SmallPlan = field(default_factory=SmallPlan)
    boost: BoostPlan = field(default_factory=BoostPlan)


@dataclass(frozen=True)
class Material:
    """The target, its texts, and what is wanted of them."""

    target: nn.Module
    program: TreeProgram
    plan: DraftPlan
    learned: Shelf
    held_out: Shelf
    start: nn.Module | None
    """A model to begin with, for kinds that may; it stays as it is."""
    tokenizer: Any


def taps_of_kind(program: TreeProgram, target: nn.Module, plan: DraftPlan) -> list[str]:
    """Names of the target's outputs that a kind of student reads. Raises InvalidOption."""
    if plan.kind not in HEADS:
        return []
    return [f"{PREFIX}{k}" for k in HeadSizes.of(program, embedding_of(target), plan.head).taps]


def new_eagle3(material: Material) -> Student:
    return eagle3(*_head(material))


def new_parallel(material: Material) -> Student:
    return parallel(*_head(material))


def new_small(material: Material, number: int = 0) -> Student:
    """The same for the same number."""
    plan, program = material.plan, material.program
    context = program.max_context or 2048
    if material.start is None:
        model = small_model(plan.small, program.vocab_size, context, plan.training.seed + number)
    else:
        model = copy.deepcopy(material.start)
    return SmallStudent(model, program.device, plan.small.depth, material.tokenizer)


def card(plan: DraftPlan, measured: Sequence[Measured], texts: int) -> Mapping[str, Any]:
    """What is said of how a draft came to be."""
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


def _head(material: Material) -> tuple[HeadSizes, Tensor, Tensor | None, Tensor | None, HeadPlan, int]:
    plan, embedding = material.plan, embedding_of(material.target)
    sizes = HeadSizes.of(material.program, embedding, plan.head)
    ids = commonest(material.learned.answers(), plan.head.vocabulary, sizes.vocab)
    return sizes, embedding, _output_of(material.target, sizes), ids, plan.head, plan.training.seed
