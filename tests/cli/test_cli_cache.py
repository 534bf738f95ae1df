"""`treespec cache`: what is saved, and its removal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from treespec_compiler.cli.main import main
from treespec_compiler.program.saved.store import Store

RECORD = {"name": "treeify", "matches": 3, "seconds": 0.5}
PROGRAM = {
    "max_context": 128,
    "proved_from": ["mask"],
    "history": [RECORD],
    "state": {"sites": [{"mask": {"window": 4}}]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    where = tmp_path / "programs"
    for name in ("aa11", "aa22"):
        parts: dict[str, Any] = {"about": {"model": "Decoder", "saved": 1.0}, "trace": {"digests": ["x"]}}
        assert Store(where).write(name, parts | {"program": PROGRAM}, {})
    return where


def run(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["cache", *words])
    return code, capsys.readouterr().out


def test_list(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run("list", "--dir", str(folder), capsys=capsys)
    assert code == 0 and "aa11" in out and "Decoder" in out and "2 programs" in out
    _, out = run("list", "--dir", str(folder), "--json", capsys=capsys)
    assert {row["name"]: row["model"] for row in json.loads(out)} == {"aa11": "Decoder", "aa22": "Decoder"}
    (folder / "aa11.program").write_bytes(b"nothing")
    _, out = run("list", "--dir", str(folder), capsys=capsys)
    assert "not readable" in out


def test_show(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run("show", "aa2", "--dir", str(folder), "--json", capsys=capsys)
    found = json.loads(out)
    assert code == 0 and found["max_context"] == 128 and found["passes"] == [RECORD]
    code, out = run("show", "aa22", "--dir", str(folder), capsys=capsys)
    assert code == 0 and "treeify" in out and "window" in out


@pytest.mark.parametrize("name", [["aa"], ["bb"], []])
def test_show_wants_one_name(folder: Path, name: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "show", *name, "--dir", str(folder)]) == 2
    assert "expected the beginning of one program's name" in capsys.readouterr().err


def test_clear(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.txt").write_text("not a program")
    code, out = run("clear", "--dir", str(folder), capsys=capsys)
    assert code == 0 and "Removed 2 programs" in out
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TREESPEC_CACHE_DIR", str(tmp_path))
    assert run("path", capsys=capsys) == (0, f"{tmp_path / 'programs'}\n")
