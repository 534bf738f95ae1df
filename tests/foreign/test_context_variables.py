"""What a context variable gives is a part of a program, which is made anew where it gives something else."""

from __future__ import annotations

from contextvars import Context, ContextVar

import context_variables
import pytest
import torch
from context_variables import ScaledByContext
from oracles import EAGER
from styles import built

import treespec_compiler as treespec

IDS = torch.tensor([3, 1, 4, 1])


@pytest.mark.rare
def test_another_value_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(ScaledByContext)
    program = treespec.tree_program(model, options=EAGER)

    def check() -> None:
        logits = program.prefill(IDS, program.new_cache(8))
        torch.testing.assert_close(logits, model(IDS[None])[0, -1], atol=1e-5, rtol=1e-5)

    check()
    graph = program.graph_module
    token = context_variables.SCALE.set(7.0)
    try:
        check()
        assert program.graph_module is not graph
        Context().run(check)  # where nobody has set it
    finally:
        context_variables.SCALE.reset(token)
    monkeypatch.setattr(context_variables, "SCALE", ContextVar("other", default=-3))
    check()
