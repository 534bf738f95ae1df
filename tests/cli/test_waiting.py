"""The stages of a conversion, as they are told and shown."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from modules import RopeTril
from rich.console import Console

import treespec_compiler as treespec
from treespec_compiler.cli import waiting as shown
from treespec_compiler.cli.waiting import described, waiting
from treespec_compiler.stages import stage, watched


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shown, "cache_dir", lambda: tmp_path)
    return tmp_path / "stages.json"


def quiet() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def test_stages_lie_in_each_other() -> None:
    told: list[str] = []
    with watched(told.append):
        with stage("outer"), stage("inner"):
            pass
        with pytest.raises(ValueError), stage("failing"):
            raise ValueError
    with stage("unwatched"):
        pass
    assert told == ["outer", "inner", "outer", "", "failing", ""]


@pytest.mark.converts
def test_a_conversion_tells_its_stages() -> None:
    told: list[str] = []
    model = RopeTril().eval()  # a program does not keep its model, and has nothing to be compared with when it is gone
    with watched(told.append):
        treespec.tree_program(model, options={"lowering": "eager"}).new_cache(16)
    assert [t for t in told if t] == ["capturing the model", "proving and rewriting", "comparing with the model"]


def test_the_last_times_are_kept_and_shown(cache: Path) -> None:
    for name in ("a", "b", "a"):
        with waiting(quiet(), name), stage("capturing"):
            pass
    found = json.loads(cache.read_text("utf-8"))["seconds"]
    assert list(found) == ["b", "a"] and set(found["a"]) == {"capturing"}
    assert described("capturing", {"capturing": 31.2}) == "capturing (31 s the last time)"
    assert described("compiling", {"capturing": 31.2}) == "compiling"


def test_a_terminal_shows_the_stage() -> None:
    screen = io.StringIO()
    with waiting(Console(file=screen, force_terminal=True, width=80), "m"), stage("capturing [the model]"):
        pass
    assert "capturing [the model]" in screen.getvalue()


def test_nothing_is_shown_elsewhere_and_nothing_kept_of_nothing(cache: Path) -> None:
    console = quiet()
    with waiting(console, "m"):
        pass
    assert not console.file.getvalue() and not cache.exists()  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 9}', '{"schema": 1, "seconds": {"m": {"capturing": "long"}}}'])
def test_a_file_of_something_else_is_replaced(cache: Path, text: str) -> None:
    cache.write_text(text)
    with waiting(quiet(), "m"), stage("capturing"):
        pass
    assert set(json.loads(cache.read_text("utf-8"))["seconds"]["m"]) == {"capturing"}


def test_a_refusal_keeps_no_times(cache: Path) -> None:
    with pytest.raises(ValueError), waiting(quiet(), "m"), stage("capturing"):
        raise ValueError
    assert not cache.exists()


def test_few_names_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "MOST", 2)
    for name in "abc":
        with waiting(quiet(), name), stage("capturing"):
            pass
    assert list(json.loads(cache.read_text("utf-8"))["seconds"]) == ["b", "c"]
