"""The comparison of every program with its model before it is used, and what it takes for rounding."""

from __future__ import annotations

import logging

import modules
import pytest
import torch
from oracles import EAGER
from torch import nn

import treespec_compiler as treespec
from treespec_compiler.capture.call import call_spec
from treespec_compiler.program.rounding import is_rounding
from treespec_compiler.program.semantics import eager_logits
from treespec_compiler.program.tree_program import TreeProgram


def _model() -> nn.Module:
    torch.manual_seed(0)
    return modules.NanoGPT().eval()


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs whose trees are away from the model."""
    verify = TreeProgram.verify
    monkeypatch.setattr(TreeProgram, "verify", lambda *args: verify(*args) * 1.01)


def test_a_right_program_is_compared_once() -> None:
    model = _model()
    program = treespec.tree_program(model, options=EAGER)
    assert program.verify_seconds == 0
    program.new_cache(8)
    seconds = program.verify_seconds
    assert 0 < seconds <= program.compile_seconds
    program.new_cache(8)
    assert program.verify_seconds == seconds


def test_a_wrong_program_is_refused(wrong: None) -> None:
    model = _model()
    program = treespec.tree_program(model, options=EAGER)
    for _ in range(2):
        with pytest.raises(treespec.Unsupported, match="does not compute what the model does"):
            program.new_cache(8)


def test_a_refusal_of_the_comparison_may_mean_the_plain_loop(wrong: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "treespec"):
        out = treespec.generate(_model(), [1, 2, 3], max_new_tokens=2, options=EAGER, on_unsupported="fallback")
    assert out.stats.fallback is not None and "does not compute" in out.stats.fallback


def test_it_can_be_left_out(wrong: None) -> None:
    model = _model()
    program = treespec.tree_program(model, options={**EAGER, "verify": "off"})
    program.new_cache(8)
    assert program.verify_seconds == 0


class Cancelling(nn.Module):
    """Loses most of its digits in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return (x + 3e3) - 3e3


def test_rounding_is_measured_on_the_model() -> None:
    torch.manual_seed(0)
    ids = [1, 2, 3]
    for model, taken in ((Cancelling(), True), (nn.Sequential(nn.Embedding(7, 64)), False)):
        call = call_spec(model)
        expected = eager_logits(model, call, ids, torch.device("cpu"))[-1]
        assert is_rounding(model, call, ids, expected * (1 + 1e-5), expected)
        assert is_rounding(model, call, ids, expected * (1 + 3e-4), expected) is taken
        assert not is_rounding(model, call, ids, expected * 1.1, expected)
