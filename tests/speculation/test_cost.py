"""Latency tables: interpolation, files, and the identity of speed. No test asserts on real time."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
from fake_program import FakeProgram, table_row

from treespec_compiler.errors import CorruptTable
from treespec_compiler.speculation.cost import latency as cost
from treespec_compiler.speculation.cost.latency import CostModel, LatencyTable, Point, read_table, write_table

POINTS = [
    Point(1, 128, 1, 1.0),
    Point(4, 128, 1, 1.3),
    Point(8, 128, 1, 2.1),
    Point(1, 1152, 1, 2.0),
    Point(4, 1152, 1, 2.3),
    Point(8, 1152, 1, 3.1),
]


def test_seconds_are_interpolated_in_nodes_and_context():
    table = LatencyTable(POINTS)
    assert table.seconds(1, 0) == pytest.approx(1.0)  # before the first context: the first
    assert table.seconds(2, 128) == pytest.approx(1.1 + 0.125)  # rounded up to 256 tokens
    assert table.seconds(4, 1280) == pytest.approx(2.3 + 0.125)
    assert table.seconds(6, 640 + 128) == pytest.approx(1.7 + 0.625)
    assert table.seconds(12, 0) == pytest.approx(2.1 + 4 * 0.2)  # beyond: the last slope


def test_more_nodes_never_take_less_time():
    noisy = LatencyTable([Point(1, 0, 1, 1.0), Point(2, 0, 1, 1.5), Point(3, 0, 1, 1.2), Point(8, 0, 1, 2.0)])
    curve = noisy.curve(0)
    assert curve[1:] == sorted(curve[1:]) and curve[2] == curve[3] == 1.2


def test_one_stalled_call_spoils_no_other():
    points = [Point(n, c, 1, 1 + 0.1 * n + 0.001 * c) for c in (128, 512) for n in (1, 2, 4)]
    stalled = LatencyTable([replace(points[0], seconds=12.0), *points[1:]])
    assert stalled.seconds(1, 256) == pytest.approx(LatencyTable(points).seconds(2, 256), rel=0.1)
    assert stalled.points[1:] == points[1:]


def test_a_batch_that_was_not_measured_counts_its_nodes():
    table = LatencyTable([*POINTS, Point(1, 128, 4, 1.2), Point(4, 128, 4, 3.0)])
    assert table.seconds(4, 128, batch=4) == pytest.approx(3.0)
    assert table.seconds(2, 128, batch=2) == table.seconds(4, 128)


def test_the_speed_identity():
    target, draft = LatencyTable(POINTS), LatencyTable.assumed(0.1, 0.01)
    model = CostModel(target, [draft, None], overhead=0.05)
    assert model.step(0, 4, (1, 2, 3)) == pytest.approx(target.seconds(4, 0) + 0.1 + 0.11 + 0.12 + 0.05)
    assert model.step(1, 4, (1, 2, 3)) == pytest.approx(1.3 + 0.05)
    assert model.step(0, 1, ()) == target.seconds(1, 0)
    assert not model.measured and CostModel(target, [None]).measured


def test_sampling_costs_its_rows():
    target, draft = LatencyTable(POINTS), LatencyTable.assumed(0.1, 0.01)
    greedy, sampled = (CostModel(target, [draft, None], 0.05, row) for row in (0.0, 0.01))
    assert sampled.step(0, 1, ()) == greedy.step(0, 1, ())  # plain decoding works on one row too
    assert sampled.step(0, 4, (1, 2)) - greedy.step(0, 4, (1, 2)) == pytest.approx(0.01 * (3 + 3))
    assert sampled.step(1, 4, ()) - greedy.step(1, 4, ()) == pytest.approx(0.01 * 3)


class Measurable(FakeProgram):
    """Calls take virtual time: one second, and a tenth more a node and a thousandth a token of context."""

    def __init__(self, max_context=None):
        super().__init__(table_row(8), 8, max_context)
        self.now, self.contexts = 0.0, set()

    def new_cache(self, max_tokens, slots=1):
        cache = super().new_cache(max_tokens, slots)
        cache._lengths = [0] * slots
        return cache

    def verify(self, tree, cache):
        self.contexts.add(cache._lengths[0])
        self.now += 1 + 0.1 * (len(tree) - 1) + 0.001 * cache._lengths[0]
        return super().verify(tree, cache)


def test_measuring_with_a_virtual_clock():
    program = Measurable()
    table = cost.measure(program, (1, 2, 4), (128, 512), (1, 2), budget=0.0, clock=lambda: program.now)
    assert len(table.points) == 12
    assert table.seconds(1, 128) == pytest.approx(1.128 + 0.128)
    assert table.seconds(3, 512) == pytest.approx(1.2 + 0.512)
    assert table.seconds(2, 512, batch=2) == pytest.approx(1.3 + 0.512)


def test_contexts_beyond_the_models_are_left_out():
    program = Measurable(max_context=100)
    cost.measure(program, (1, 4), (128, 512), budget=0.0, clock=lambda: program.now)
    assert program.contexts == {96}


def test_a_table_survives_its_file(tmp_path):
    path = tmp_path / "deep" / "table.json"
    write_table(path, LatencyTable(POINTS, sampled_row=1e-5), {"device": "x"})
    assert read_table(path) == LatencyTable(POINTS, sampled_row=1e-5)
    data = json.loads(path.read_text())
    assert data["schema"] == 2 and data["meta"] == {"device": "x"} and len(data["entries"]) == 6
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "a list"),
        ('{"schema": 99}', "schema 99"),
        ('{"schema": 2, "sampled_row": 0}', "an entry without 'entries'"),
        ('{"schema": 2, "sampled_row": 0, "entries": [{"nodes": 1}]}', "an entry without 'context'"),
        ('{"schema": 2, "entries": []}', "an entry without 'sampled_row'"),
        ('{"schema": 2, "sampled_row": 0, "entries": []}', "entries that are no measurements"),
        (
            '{"schema": 2, "sampled_row": 0, "entries": [{"nodes": 1, "context": 0, "batch": 1, "seconds": -1}]}',
            "no measurements",
        ),
    ],
)
def test_corrupt_tables_are_named(tmp_path, text, problem):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(CorruptTable) as caught:
        read_table(path)
    assert problem in str(caught.value) and str(path) in str(caught.value)
    assert "treespec tune" in str(caught.value)


def test_a_corrupt_table_is_ignored_with_a_warning_and_replaced(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TREESPEC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cost, "fingerprint", lambda program: "abc")
    monkeypatch.setattr(cost, "meta", lambda program: {})
    monkeypatch.setattr(cost, "measure", lambda program, **kw: LatencyTable(POINTS))
    path = cost.table_path("abc")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("nonsense")
    with caplog.at_level(logging.WARNING):
        table = cost.latency(Measurable())
    assert table.points == POINTS and len(caplog.records) == 1 and str(path) in caplog.text
    assert read_table(path).points == POINTS
    monkeypatch.setattr(cost, "measure", None)
    assert cost.latency(Measurable()).points == POINTS  # from the file
