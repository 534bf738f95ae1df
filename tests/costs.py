"""What each room's tests cost, in seconds of workers, at the end of a run. `tests/conftest.py` takes this hook."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

LEAST = 60.0
"""Seconds of a run that is worth a table."""


def seconds_of_rooms(reports: list[Any]) -> Counter[str]:
    """By the folder under `tests/` that a test lies in."""
    found: Counter[str] = Counter()
    for report in reports:
        found[report.nodeid.split("/")[1]] += report.duration
    return found


def pytest_terminal_summary(terminalreporter: Any) -> None:
    kinds = terminalreporter.stats.values()
    reports = [report for kind in kinds for report in kind if hasattr(report, "duration") and hasattr(report, "when")]
    found = seconds_of_rooms([report for report in reports if report.nodeid.count("/") > 1])
    if os.environ.get("CI") or sum(found.values()) > LEAST:
        terminalreporter.section("seconds of workers, by room")
        for room, seconds in found.most_common():
            terminalreporter.line(f"{seconds:7.0f} {room}")
