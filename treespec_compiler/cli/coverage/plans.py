"""transformers' own plans for tensor parallel ranks (`tp_plan`), held against what pass `shard` found by itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

COLUMN, ROW, WHOLE = "column", "row", "whole"

# What a style of transformers says of a product's weight: cut by outputs, by inputs, or there on every rank.
_MEANS = {
    "colwise": COLUMN,
    "packed_colwise": COLUMN,
    "colwise_gather_output": COLUMN,
    "rowwise": ROW,
    "packed_rowwise": ROW,
    "rowwise_split_input": ROW,
    "replicate": WHOLE,
    "replicated_with_grad_allreduce": WHOLE,
    "mla_kv_a_proj": WHOLE,
}


@dataclass(frozen=True)
class OtherCut:
    """Weights of this name, with `*` for numbers, that are cut in another way."""

    name: str
    theirs: str
    here: str

    def __str__(self) -> str:
        return f"`{self.name}` {self.theirs}, here {self.here}"


@dataclass(frozen=True)
class AgainstPlan:
    """`agree`: names of weights that both cut in the same way; `beside`: products here that the plan does not name."""

    agree: int
    differ: tuple[OtherCut, ...]
    beside: int


def against_plan(model: nn.Module, products: Mapping[str, str]) -> AgainstPlan | None:
    """`products`: how each weight of a product lies here, by its name: "column", "row" or "whole".

    None where the model brings no plan. Entries that name no product (norms, tables, what only routes experts) say
    nothing here.
    """
    plan = getattr(model, "tp_plan", None)
    if not plan:
        return None
    agree: set[str] = set()
    beside: set[str] = set()
    differ: set[OtherCut] = set()
    for weight, here in products.items():
        name = re.sub(r"\.\d+(?=\.|$)", ".*", weight.removesuffix(".weight"))
        theirs = _MEANS.get(plan.get(name, ""))
        if theirs is None:
            beside.add(name)
        elif theirs == here:
            agree.add(name)
        else:
            differ.add(OtherCut(name, plan[name], here))
    return AgainstPlan(len(agree), tuple(sorted(differ, key=str)), len(beside))
