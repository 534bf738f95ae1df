"""In CI a skipped test is a failure, unless it is marked `gpu`: a tool that is missing there would hide what it tests.

`tests/conftest.py` takes these hooks. CI is where the environment variable CI is set, as `.ci/run` sets it.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

FIX = "with CI set only a test marked gpu may skip; README.md, 'Run the tests', says what the tests need"


def reason_of(report: Any) -> str:
    """Why a test or a file was skipped, in the words of its skip: pytest keeps (path, line, words)."""
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)


def judge_skip(report: Any, keywords: Any) -> None:
    """Turn a skip into a failure where CI runs; expected failures (`xfail`) are no skips."""
    if not os.environ.get("CI") or not report.skipped or hasattr(report, "wasxfail") or "gpu" in keywords:
        return
    report.longrepr = f"{reason_of(report)}\n{FIX}"
    report.outcome = "failed"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    judge_skip(report, item.keywords)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    judge_skip(report, collector.keywords)
    return report
