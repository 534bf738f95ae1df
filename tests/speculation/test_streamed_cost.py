"""What streaming changes about the choice of trees: fewer points are measured, and larger trees are tried."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from treespec_compiler.offload.ring import StreamStats
from treespec_compiler.speculation.cost import latency
from treespec_compiler.speculation.policies.auto import STREAMED_DEPTH, STREAMED_NODES, Auto


def test_larger_trees_over_streamed_weights() -> None:
    resident, streamed = SimpleNamespace(stream_stats=None), SimpleNamespace(stream_stats=StreamStats())
    assert Auto().for_target(resident) == Auto() == Auto().for_target(object())
    wide = Auto().for_target(streamed)
    assert (wide.max_nodes, wide.max_depth) == (STREAMED_NODES, STREAMED_DEPTH)
    assert Auto(nodes=500, depth=20).for_target(streamed) == Auto(nodes=500, depth=20)


def test_few_points_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    class Program:
        stream_stats = StreamStats()

    asked = {}

    def measure(program, **settings):
        asked.update(settings)
        return latency.LatencyTable([latency.Point(1, 0, 1, 1.0), latency.Point(2, 0, 1, 1.0)])

    monkeypatch.setattr(latency, "measure", measure)
    monkeypatch.setattr(latency, "fingerprint", lambda program: "streamed")
    monkeypatch.setattr(latency, "meta", lambda program: {})
    monkeypatch.setattr(latency, "table_path", lambda key: tmp_path / f"{key}.json")
    assert latency.latency(Program()).seconds(200) == 1.0
    assert asked == {"nodes": latency.STREAMED_NODES, "contexts": latency.STREAMED_CONTEXTS}
