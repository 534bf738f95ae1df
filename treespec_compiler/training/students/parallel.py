"""A parallel head: what it reads behind the root is learned, and does not depend on what it said (`heads.parallel`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...speculation.drafts.heads.checkpoint import Tensors
from ...speculation.drafts.heads.slots import DEPTH, DOWN, EMBEDDING, KIND, RANK, STATE, UP, HeadSlots
from ..texts import WrittenText
from ..unrolled import unrolled
from .heads import HeadPlan, HeadSizes, HeadStudent, configuration, fresh

OWN = (EMBEDDING, STATE, DOWN, UP)


class ParallelStudent(HeadStudent):
    """As a head of EAGLE-3, with slots instead of its own outputs."""

    def _of_layer(self) -> Sequence[str]:
        return [name for name in self.weights if name not in OWN]

    def logits(self, text: WrittenText) -> Sequence[Tensor]:
        slots = self._slots()

        def inner(depth: int, outputs: Tensor) -> tuple[Tensor, Tensor]:
            both = slots.embedding[depth - 1], slots.state[depth - 1]
            return both[0].expand(len(outputs), -1), both[1].expand(len(outputs), -1)

        levels = unrolled(self.head(), self._embedding, text, self._plan.depth, inner)
        behind = slots.behind(self._embedding[text.tokens[text.prompt : text.prompt + text.roots]])
        return [level + behind[depth:] for depth, level in enumerate(levels)]

    def _slots(self) -> HeadSlots:
        folder = Path("(a head in training)")
        named = {name: self.weights[name] for name in OWN}
        return HeadSlots.take(folder, self._config, Tensors(folder, named, torch.float32, self._embedding.device))


def parallel(
    sizes: HeadSizes, embedding: Tensor, output: Tensor | None, ids: Tensor | None, plan: HeadPlan, seed: int
) -> ParallelStudent:
    """One that knows nothing but how to hand on what it reads. `output` [vocab, h] is the target's head, if it has one
    of that width."""
    rows = sizes.vocab if ids is None else len(ids)
    config = configuration(sizes, plan, rows) | {KIND: "parallel", DEPTH: plan.depth, RANK: plan.follow}
    config["architectures"] = ["TreespecParallelHead"]
    draw = torch.Generator().manual_seed(seed + 1)
    h = sizes.width
    weights = fresh(config, output if output is None or ids is None else output[ids.to(output.device)], seed) | {
        EMBEDDING: torch.randn(plan.depth - 1, h, generator=draw),
        STATE: torch.randn(plan.depth - 1, h, generator=draw),
        DOWN: torch.randn(plan.follow, h, generator=draw) * h**-0.5,
        UP: torch.zeros(rows, plan.follow),
    }
    return ParallelStudent(config, weights, ids, embedding, plan)
