"""What rings note while somebody looks, and how it is drawn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

from streams import opened

from treespec_compiler.cli.bench_offload import followed, summary
from treespec_compiler.offload.timeline import Span, noted, timeline_svg
from treespec_compiler.runtime.stats import Stats


def test_reads_and_waits_are_noted_while_somebody_looks(tmp_path: Path) -> None:
    ring = opened(tmp_path)
    with noted() as spans:
        for layer in (3, 4):
            ring.fetch(layer)
    assert {span.label for span in spans if span.what == "read"} >= {"3", "4"}
    assert sum(span.what == "wait" for span in spans) == 2 and all(s.ended >= s.began for s in spans)
    count = len(spans)
    ring.fetch(0)
    assert len(spans) == count


def test_a_picture_shows_what_lies_between_its_ends() -> None:
    spans = [Span("read", 1.0, 1.2, "7"), Span("verify", 1.0, 1.5), Span("draft", 3.0, 4.0), Span("wait", 1.0, 1.1)]
    root = ElementTree.fromstring(timeline_svg(spans, 0.9, 1.9))
    bars = [node for node in root.iter() if node.tag.endswith("rect")]
    assert len(bars) == 3 + 4  # the draft's is not in it; four are the legend's
    texts = [node.text for node in root.iter() if node.tag.endswith("text")]
    assert "7" in texts and "1000 ms" in texts
    assert timeline_svg([], 0.0, 0.0).endswith("</svg>")


def test_steps_become_spans() -> None:
    stats = Stats()

    def steps():
        for _ in range(2):
            stats.draft_seconds += 1.0
            stats.verify_seconds += 2.0
            yield None

    class Run(SimpleNamespace):
        def __iter__(self):
            return steps()

    spans: list[Span] = []
    marks = followed(Run(stats=stats), spans)
    assert len(marks) == 3 and [span.what for span in spans] == ["draft", "verify"] * 2
    assert [round(span.ended - span.began, 6) for span in spans] == [1.0, 2.0] * 2
    assert summary(stats, 10**9, 2e9)["seconds_of_a_step_by_the_disk"] == 0.5
