"""The table of what each room's tests cost."""

from __future__ import annotations

from types import SimpleNamespace

from costs import pytest_terminal_summary, seconds_of_rooms


def report(nodeid: str, seconds: float) -> SimpleNamespace:
    return SimpleNamespace(nodeid=nodeid, duration=seconds, when="call")


REPORTS = [report("tests/ir/test_a.py::b", 1.5), report("tests/ir/test_c.py::d", 2.0), report("tests/cli/e.py::f", 90)]


def test_seconds_are_added_up_by_room() -> None:
    assert seconds_of_rooms(REPORTS) == {"ir": 3.5, "cli": 90}


class Terminal:
    def __init__(self, reports: list[SimpleNamespace]) -> None:
        self.stats = {"passed": reports, "": [object()]}
        self.lines: list[str] = []

    def section(self, title: str) -> None:
        self.lines.append(title)

    def line(self, text: str) -> None:
        self.lines.append(text)


def test_the_dearest_come_first(monkeypatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    long, short = Terminal(REPORTS), Terminal(REPORTS[:2])
    pytest_terminal_summary(long)
    pytest_terminal_summary(short)
    assert long.lines[1:] == ["     90 cli", "      4 ir"] and short.lines == []
