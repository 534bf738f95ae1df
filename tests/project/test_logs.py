"""Every logger of the package is below `treespec`, and `TREESPEC_LOGS` reaches it by name."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from imports import PACKAGE, modules

from treespec_compiler import logs
from treespec_compiler.logs import ROOT, TOPICS, logger, set_logs

# Other packages' loggers, made quiet, and what stands in for a model's own during a trace.
FOREIGN = {"capture.surroundings", "capture.tracing", "cli.inspection", "cli.models"}


@pytest.fixture(autouse=True)
def levels() -> Iterator[None]:
    """Handlers and levels as they were."""
    known = [ROOT, *(v for k, v in ROOT.manager.loggerDict.items() if k.startswith("treespec."))]
    before = {log: log.level for log in known if isinstance(log, logging.Logger)}
    handlers, propagate = ROOT.handlers[:], ROOT.propagate
    yield
    ROOT.handlers[:], ROOT.propagate = handlers, propagate
    for name, log in ROOT.manager.loggerDict.items():
        if name.startswith("treespec.") and isinstance(log, logging.Logger):
            log.setLevel(before.get(log, logging.NOTSET))
    ROOT.setLevel(before[ROOT])


def test_a_modules_logger_is_its_name_under_treespec() -> None:
    assert logger("treespec_compiler.codegen.gpu.tune").name == "treespec.codegen.gpu.tune"


def test_modules_take_their_logger_from_here() -> None:
    """`logging.getLogger` makes one that TREESPEC_LOGS does not reach."""
    made = set()
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "getLogger":
                made.add(name.removeprefix(f"{PACKAGE}."))
    assert made - FOREIGN == {"logs"}


@pytest.mark.parametrize(
    "name", ["codegen", "codegen.gpu", "passes", "program", "runtime.generate", "pipeline", *TOPICS]
)
def test_a_name_reaches_its_modules(name: str) -> None:
    set_logs(name)
    module = TOPICS.get(name, name)
    assert f"{PACKAGE}.{module}" in modules()
    log = logger(f"{PACKAGE}.{module}.inner")
    assert log.isEnabledFor(logging.INFO) and not log.isEnabledFor(logging.DEBUG)
    set_logs(f"+{name}")
    assert log.isEnabledFor(logging.DEBUG)
    set_logs(f"-{name}")
    assert not log.isEnabledFor(logging.WARNING)


def test_messages_go_to_stderr_once(capsys: pytest.CaptureFixture[str]) -> None:
    set_logs("+passes")
    set_logs("graphs")
    logger("treespec_compiler.passes.treeify").debug("seen")
    logs.GRAPHS.debug("a graph")
    assert capsys.readouterr().err.splitlines() == ["D treespec.passes.treeify: seen", "D treespec.graphs: a graph"]


@pytest.mark.parametrize("name", ["pases", "+nothing", "-codegen.gpu.nothing", "+"])
def test_unknown_names_are_warned_about(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    set_logs(f"program,{name}")
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert f"W treespec: TREESPEC_LOGS: got {name!r}, expected all, graphs, guards, reproducer, semantics, or" in shown


def test_the_documented_names_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "inspection.md").read_text()
    chapter = text[text.index("## Logs and traces") :].partition("With `TORCH_TRACE")[0]
    for name in re.findall(r"`([a-z_.]+)`", chapter):
        set_logs(name.removeprefix("treespec."))
    assert capsys.readouterr().err == ""
