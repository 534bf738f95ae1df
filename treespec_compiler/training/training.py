"""Steps of an optimizer, with checkpoints from which a run goes on as if nothing had happened.

What a step does depends on the weights, the optimizer's state and the step's number alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidOption, UnreadableModel
from ..user_cache import replacing, write_whole
from .acceptance import HeldOut, acceptance
from .progress import Milestone, Tell, nobody
from .students.protocol import Student
from .texts import Shelf, WrittenText

CHECKPOINT = "checkpoint.pt"
CURVE = "curve.json"
FIXED_BYTES = 24
"""Of a weight: itself, its gradient, two moments, and what a step of the optimizer makes beside them."""


@dataclass(frozen=True)
class TrainingPlan:
    """How a student learns."""

    steps: int = 1000
    texts_a_step: int = 8
    rate: float = 1e-3
    """The highest learning rate: it rises to that in the first twentieth of the steps and falls to 0 with the last."""
    seed: int = 0
    evaluate_every: int = 100
    """Steps between two measurements of acceptance."""
    held_out: int = 32
    """Texts of prompts that are never learned from."""
    memory_mb: int = 4096
    """What training may hold beside the target, in MB."""
    checkpoint_seconds: float = 60.0

    def rate_at(self, step: int) -> float:
        rising = max(1, self.steps // 20)
        return self.rate * min((step + 1) / rising, (self.steps - step) / max(1, self.steps - rising + 1), 1.0)


@dataclass(frozen=True)
class Measured:
    """Of a student as it is after some steps."""

    step: int
    loss: float
    """Mean of the steps since the last measurement, in nats a root."""
    held_out: HeldOut


def texts_of(step: int, texts: int, plan: TrainingPlan) -> list[int]:
    """Which texts a step learns from: every one once before any comes again, in another order each time."""
    found = []
    for place in range(step * plan.texts_a_step, (step + 1) * plan.texts_a_step):
        epoch, index = divmod(place, texts)
        found.append(int(np.random.default_rng((plan.seed, epoch)).permutation(texts)[index]))
    return found


def train(
    student: Student, learned: Shelf, held_out: Shelf, plan: TrainingPlan, folder: Path, tell: Tell = nobody
) -> list[Measured]:
    """Train from where the folder's checkpoint is to the last step; what was measured on the way.

    Raises InvalidOption where there is nothing to learn or not enough memory is allowed, UnreadableModel for a
    checkpoint that does not fit.
    """
    if not len(learned) or not len(held_out):
        got = f"{len(learned)} texts to learn from and {len(held_out)} held out"
        raise InvalidOption(name="prompts", got=got, expected="one of each at least", fix="Give more prompts.")
    check_memory(student, max(learned.longest(), held_out.longest()), plan)
    weights = list(student.weights.values())
    optimizer = torch.optim.AdamW(weights, lr=0.0, betas=(0.9, 0.95), weight_decay=0.01)
    state = _State(folder / CHECKPOINT, student, optimizer)
    step, losses, curve = state.load()
    saved = monotonic()
    if not curve:
        curve.append(_measure(student, held_out, 0, float("nan")))
    while step < plan.steps:
        tell(Milestone("training", step, plan.steps, describe(curve[-1])))
        texts = [learned.read(i) for i in texts_of(step, len(learned), plan)]
        losses.append(_step(student, optimizer, texts, step, plan))
        step += 1
        if step % plan.evaluate_every == 0 or step == plan.steps:
            curve.append(_measure(student, held_out, step, sum(losses) / len(losses)))
            losses = []
        if step == plan.steps or monotonic() - saved > plan.checkpoint_seconds:
            state.save(step, losses, curve)
            write_whole(folder / CURVE, json.dumps([_plain(each) for each in curve], indent=1) + "\n")
            saved = monotonic()
    tell(Milestone("training", step, plan.steps, describe(curve[-1])))
    return curve


def check_memory(student: Student, tokens: int, plan: TrainingPlan) -> None:
    """Raises InvalidOption where the weights and one text of so many tokens may take more than is allowed."""
    weights = FIXED_BYTES * sum(weight.numel() for weight in student.weights.values())
    needed = -(-(weights + student.bytes_of(tokens)) // 10**6)
    if needed > plan.memory_mb:
        expected = f"{needed} at least, for texts of {tokens} tokens"
        fix = "Allow more, or make texts, vocabulary or depth smaller."
        raise InvalidOption(name="memory", got=plan.memory_mb, expected=expected, fix=fix)


def describe(measured: Measured) -> str:
    depths = " ".join(f"{share:.2f}" for share in measured.held_out.by_depth)
    return f"{measured.held_out.tokens_per_step:.2f} tokens a step held out ({depths}), loss {measured.loss:.3f}"


def _step(
    student: Student, optimizer: torch.optim.Optimizer, texts: Sequence[WrittenText], step: int, plan: TrainingPlan
) -> float:
    """One text's gradient at a time, so that memory is that of one; the mean loss of a root."""
    optimizer.param_groups[0]["lr"] = plan.rate_at(step)
    roots = sum(float(text.roots if text.counts is None else text.counts.sum()) for text in texts)
    total = 0.0
    for text in texts:
        loss = student.loss(text) / max(1.0, roots)
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(student.weights.values(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def _measure(student: Student, held_out: Shelf, step: int, loss: float) -> Measured:
    return Measured(step, loss, acceptance([student.hits(held_out.read(i)) for i in range(len(held_out))]))


def _plain(measured: Measured) -> dict[str, Any]:
    """As JSON has it, which has no number that is none."""
    found = asdict(measured)
    return {**found, "loss": None if measured.loss != measured.loss else measured.loss}


class _State:
    """A run's checkpoint: whole or as it was."""

    def __init__(self, path: Path, student: Student, optimizer: torch.optim.Optimizer) -> None:
        self._path, self._student, self._optimizer = path, student, optimizer

    def save(self, step: int, losses: Sequence[float], curve: Sequence[Measured]) -> None:
        weights = {name: weight.detach() for name, weight in self._student.weights.items()}
        said = {"step": step, "losses": list(losses), "curve": [asdict(each) for each in curve]}
        with replacing(self._path) as temporary:
            torch.save({"weights": weights, "optimizer": self._optimizer.state_dict(), "said": said}, temporary)

    def load(self) -> tuple[int, list[float], list[Measured]]:
        """The step to go on with, losses since the last measurement, and the measurements."""
        if not self._path.exists():
            return 0, [], []
        try:
            found = torch.load(self._path, map_location="cpu", weights_only=True)
            with torch.no_grad():
                for name, weight in self._student.weights.items():
                    weight.copy_(_fitting(found["weights"][name], weight))
            self._optimizer.load_state_dict(found["optimizer"])
            said = found["said"]
        except Exception as error:  # neither pickle's nor torch's exceptions have a common base
            problem, fix = f"{type(error).__name__}: {error}", "Delete it, to begin anew."
            expected = "this run's checkpoint"
            raise UnreadableModel(name=str(self._path), problem=problem, expected=expected, fix=fix) from error
        curve = [Measured(x["step"], x["loss"], HeldOut(**x["held_out"])) for x in said["curve"]]
        return said["step"], list(said["losses"]), curve


def _fitting(found: Tensor, wanted: Tensor) -> Tensor:
    if found.shape != wanted.shape:
        raise ValueError(f"{list(found.shape)} for {list(wanted.shape)}")
    return found
