"""What a draft's call costs between the target's passes. No test asserts on real time."""

from __future__ import annotations

import json
import logging

import pytest
from fake_program import FakeProgram, table_row

from treespec_compiler.errors import CorruptTable
from treespec_compiler.speculation.cost import interleaving
from treespec_compiler.speculation.cost import latency as cost
from treespec_compiler.speculation.cost.latency import LatencyTable, Point
from treespec_compiler.speculation.drafts.model import ModelDraft
from treespec_compiler.speculation.drafts.ngram import NGramDraft
from treespec_compiler.speculation.policies.auto import cost_model

VOCAB = 8


class Machine:
    """Virtual time in which a program's call takes longer when another one ran before it."""

    def __init__(self, penalty: float):
        self.now, self.penalty, self.last = 0.0, penalty, None

    def program(self, seconds: float, max_context=None):
        program = FakeProgram(table_row(VOCAB), VOCAB, max_context)
        for name in ("verify", "extend", "prefill"):
            setattr(program, name, self._timed(getattr(program, name), program, seconds))
        return program

    def _timed(self, call, program, seconds):
        def timed(*args, **kwargs):
            self.now += seconds + self.penalty * (self.last is not program)
            self.last = program
            return call(*args, **kwargs)

        return timed

    def factor(self, target, draft):
        return interleaving.measure_factor(target, ModelDraft(draft), clock=lambda: self.now)


@pytest.mark.parametrize(("penalty", "expected"), [(0.0, 1.0), (0.2, 2.0), (9.0, interleaving.LARGEST)])
def test_a_step_is_compared_with_bursts(penalty, expected):
    machine = Machine(penalty)
    # four draft calls of 0.1 s, and two changes of program
    assert machine.factor(machine.program(1.0), machine.program(0.1)) == pytest.approx(expected)


def test_short_contexts_are_kept():
    machine = Machine(0.2)
    assert machine.factor(machine.program(1.0, max_context=100), machine.program(0.1)) == pytest.approx(2.0)


def test_kept_with_the_program_and_in_a_file(tmp_path, monkeypatch, caplog):
    machine = Machine(0.0)
    target, draft = machine.program(1.0), ModelDraft(machine.program(0.1))
    assert interleaving.draft_factor(target, draft) == 1.0  # no graph: not measured
    monkeypatch.setattr(cost, "fingerprint", lambda program: "t" if program is target else "d")
    monkeypatch.setattr(cost, "meta", lambda program: {})
    monkeypatch.setattr(cost, "table_path", lambda key: tmp_path / f"{key}.json")
    monkeypatch.setattr(interleaving, "measure_factor", lambda *_: 1.5)
    assert interleaving.draft_factor(target, draft) == 1.5
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["draft_factor"] == 1.5
    monkeypatch.setattr(interleaving, "measure_factor", None)
    assert interleaving.draft_factor(target, draft) == 1.5
    interleaving._KEPT.pop(draft.program)
    assert interleaving.draft_factor(target, draft) == 1.5  # from the file
    assert interleaving.draft_factor(target, NGramDraft()) == 1.0

    path.write_text("nonsense")
    interleaving._KEPT.pop(draft.program)
    monkeypatch.setattr(interleaving, "measure_factor", lambda *_: 2.5)
    with caplog.at_level(logging.WARNING):
        assert interleaving.draft_factor(target, draft) == 2.5
    assert len(caplog.records) == 1 and str(path) in caplog.text


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"schema": 99, "draft_factor": 1.5}', '{"schema": 2, "draft_factor": 0.5}',
     '{"schema": 2, "draft_factor": NaN}'],
)  # fmt: skip
def test_corrupt_factors_are_named(tmp_path, text):
    path = tmp_path / "pair.json"
    path.write_text(text)
    with pytest.raises(CorruptTable, match="Corrupt tuning table") as caught:
        interleaving.read_factor(path)
    assert str(path) in str(caught.value)


def test_the_cost_model_multiplies_the_drafts_table(monkeypatch):
    machine = Machine(0.0)
    target, draft = machine.program(1.0), ModelDraft(machine.program(0.1))
    table = LatencyTable([Point(1, 0, 1, 1.0), Point(2, 0, 1, 1.5)])
    monkeypatch.setattr("treespec_compiler.speculation.policies.auto.latency", lambda program: table)
    monkeypatch.setattr(interleaving, "draft_factor", lambda target, draft: 1.5)
    model = cost_model(target, [draft, NGramDraft()])
    assert model.draft(0, [1, 1]) == pytest.approx(3.0) and model.draft(1, [1]) == 0.0
    assert model.verify(1) == 1.0
