"""The comparison of every program with its model before it is used, and what it takes for rounding."""

from __future__ import annotations

import logging
from typing import Any

import modules
import pytest
import torch
from oracles import EAGER
from torch import nn

import treespec_compiler as treespec
from treespec_compiler.capture.call import call_spec
from treespec_compiler.ir.specs import EVERY_ROW
from treespec_compiler.program.early_exit import EarlyExitProgram
from treespec_compiler.program.executor import Executor
from treespec_compiler.program.net import Comparison
from treespec_compiler.program.rounding import Exact, is_rounding, judged, tolerance
from treespec_compiler.program.semantics import eager_logits
from treespec_compiler.program.tree_program import TreeProgram

pytestmark = pytest.mark.converts  # what is compiled is counted or stood in for


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
    found = program.comparison
    assert (
        found is not None
        and found.rows > 10
        and modules.CONTEXT - 9 < found.tokens <= modules.CONTEXT
        and found.seconds == seconds
    )
    assert f"{found.rows} rows behind up to {found.tokens} tokens" in str(found)
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


def test_a_measure_says_what_it_allowed() -> None:
    torch.manual_seed(0)
    ids, model = [1, 2, 3], Cancelling()
    call = call_spec(model)
    expected = eager_logits(model, call, ids, torch.device("cpu"))[-1]
    near = judged(Exact(model, call, EVERY_ROW), ids, 2, expected * (1 + 1e-5), expected)
    assert near.rounded and near.own is None and near.error < near.allowed == tolerance(torch.float32)
    far = judged(Exact(model, call, EVERY_ROW), ids, 2, expected * (1 + 3e-4), expected)
    assert far.rounded and far.own is not None and near.allowed < far.error < far.allowed
    text = str(Comparison(1.0, 1, 3, far))
    assert f"the model itself is {far.own:.1e}" in text and f"{far.allowed:.1e} is taken for rounding" in text


class Off:
    """What makes the outputs of derived graphs wrong, and leaves the program's own alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, output: int) -> None:
        real = Executor.run

        def run(self: Executor, parts: Any, cache: Any, rows: Any = None) -> Any:
            found = list(real(self, parts, cache, rows))
            if self.options.lowering == "inductor" and len(found) > output and not parts[0].chain:
                found[output] = found[output].roll(1, 0)  # the rows of other nodes
            return found

        monkeypatch.setattr(Executor, "run", run)


INDUCTOR = {"lowering": "inductor"}


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.rare
def test_wrong_tapped_outputs_are_refused(monkeypatch: pytest.MonkeyPatch, output: int) -> None:
    program = treespec.tree_program(_model(), options=INDUCTOR)
    cache = program.new_cache(16)
    program.prefill([1, 2], cache)
    tree = treespec.TokenTree([1, 2, 3], [-1, 0, 0])
    with monkeypatch.context() as patched:
        Off(patched, output)
        for _ in range(2):
            with pytest.raises(treespec.Unsupported, match="a graph derived from the program's"):
                program.verify(tree, cache, outputs=("logits", "hidden:1"))
    seconds = program.verify_seconds
    assert set(program.verify(tree, cache, outputs=("logits", "hidden:1"))) == {"logits", "hidden:1"}
    assert program.verify_seconds > seconds
    seconds = program.verify_seconds
    program.verify(tree, cache, outputs=("logits", "hidden:1"))
    assert program.verify_seconds == seconds


@pytest.mark.rare
def test_a_wrong_early_exit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    program = treespec.tree_program(_model(), options=INDUCTOR)
    cache = program.new_cache(16)
    program.prefill([1, 2], cache)
    exit_, tree = EarlyExitProgram(program, 1), treespec.TokenTree([1, 2, 3], [-1, 0, 0])
    with monkeypatch.context() as patched:
        Off(patched, 0)
        with pytest.raises(treespec.Unsupported, match=r"logits after .* tokens differs"):
            exit_.verify(tree, cache)
    assert exit_.verify(tree, cache).shape == (3, modules.VOCAB)


def test_derived_graphs_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    program = treespec.tree_program(_model(), options={**EAGER, "verify": "off"})
    program.verify(treespec.TokenTree([1], [-1]), program.new_cache(8), outputs=("hidden:1",))
    assert program.verify_seconds == 0
