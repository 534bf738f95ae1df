"""An EAGLE-3 head of a target's own (Li et al., arXiv 2503.01840), in the form of EAGLE-3.1 (arXiv 2605.09992)."""

from __future__ import annotations

from torch import Tensor

from .heads import HeadPlan, HeadSizes, HeadStudent, configuration, fresh


def eagle3(
    sizes: HeadSizes, embedding: Tensor, output: Tensor | None, ids: Tensor | None, plan: HeadPlan, seed: int
) -> HeadStudent:
    """One that knows nothing but how to hand on what it reads. `output` [vocab, h] is the target's head, if it has one
    of that width."""
    config = configuration(sizes, plan, sizes.vocab if ids is None else len(ids))
    rows = output if output is None or ids is None else output[ids.to(output.device)]
    return HeadStudent(config, fresh(config, rows, seed), ids, embedding, plan)
