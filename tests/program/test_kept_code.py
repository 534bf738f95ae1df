"""Compiled code on disk: taken where it is whole and the user's own, and nowhere else."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from treespec_compiler.ir.device import profile
from treespec_compiler.program import kept_code
from treespec_compiler.program.kept_code import CallPlan, find, keep, library_of
from treespec_compiler.program.machine import code_name

PLAN = CallPlan([(0, [0, 1], [2]), (1, [2], [3]), (0, [3, 2], [2])], 2, [2, 3])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TREESPEC_CACHE_DIR", str(tmp_path))
    return tmp_path / "code"


@pytest.fixture
def library(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file that is taken for a library which doubles or adds."""

    def loaded(path: Path, expected: str) -> Callable[[list[Any]], list[Any]]:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == expected
        return lambda values: [sum(values) if len(values) > 1 else 2 * values[0]]

    monkeypatch.setattr(kept_code, "_loaded", loaded)
    (tmp_path / "built.so").write_bytes(b"code")
    return tmp_path / "built.so"


def test_a_plan_calls_libraries_in_turn() -> None:
    add, double = (lambda values: [sum(values)]), (lambda values: [2 * values[0]])
    run = PLAN.run([add, double])
    assert run([3, 4]) == [21, 14] and run([1, 1]) == [6, 4]


def test_what_is_kept_is_found(folder: Path, library: Path) -> None:
    assert find("name") is None
    keep("name", PLAN, [library, library])
    run = find("name")
    assert run is not None and run([3, 4]) == [21, 14]
    assert find("other") is None


@pytest.mark.parametrize("change", ["steps", "schema", "text"])
def test_a_damaged_plan(folder: Path, library: Path, change: str) -> None:
    keep("name", PLAN, [library, library])
    path = folder / "name.json"
    about = json.loads(path.read_text())
    changed = {"steps": about | {"steps": [[0]]}, "schema": about | {"schema": 99}, "text": []}[change]
    path.write_text(json.dumps(changed))
    assert find("name") is None


def test_what_others_may_write_is_not_loaded(
    folder: Path, library: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep("name", PLAN, [library, library])
    (built,) = folder.glob("*.so")
    with caplog.at_level(logging.WARNING, logger="treespec"):
        built.chmod(0o666)
        assert find("name") is None
        built.rename(tmp_path / "elsewhere.so")
        built.symlink_to(tmp_path / "elsewhere.so")
        assert find("name") is None
    assert caplog.text.count("another user may write it") == 2


def test_a_changed_library_is_not_loaded(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "built.so").write_bytes(b"code")
    keep("name", PLAN, [tmp_path / "built.so"] * 2)
    (built,) = folder.glob("*.so")
    built.write_bytes(b"other code")
    with caplog.at_level(logging.WARNING, logger="treespec"):
        assert find("name") is None
    assert "was changed" in caplog.text


def test_what_no_library_is(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "built.so").write_bytes(b"no library")
    keep("name", PLAN, [tmp_path / "built.so"] * 2)
    assert find("name") is None


def test_a_folder_that_cannot_be_written(folder: Path, library: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.write_text("a file")
    with caplog.at_level(logging.WARNING, logger="treespec"):
        keep("name", PLAN, [library, library])
    assert "is not kept" in caplog.text and find("name") is None


def test_the_last_used_ones_stay(folder: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_code, "MOST", 2)
    for name in ("a", "b", "c"):
        library.write_bytes(name.encode())
        keep(name, PLAN, [library, library])
        assert find(name) is not None
    assert find("a") is None and len(list(folder.glob("*.so"))) == 2


def test_another_wrapper_is_more_than_a_library() -> None:
    constant, f = torch.ones(2), len

    def with_constant(values: list[Any]) -> Any:
        return f([*values, constant])

    def with_more(values: list[Any]) -> Any:
        return f(sorted(values))

    def plain(values: list[Any]) -> Any:
        values.clear()
        return f(values)

    for call in (with_constant, with_more, plain, len, None):
        assert library_of(call) is None


def test_names_differ_by_what_code_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    names = [code_name("a", cpu), code_name("b", cpu)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    names.append(code_name("a", cpu))
    monkeypatch.setenv("TORCHINDUCTOR_SIZE_ASSERTS", "1")
    names.append(code_name("a", cpu))
    assert len(set(names)) == 4
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    assert code_name("a", cpu) == names[-1]
    assert profile(cpu).direct_calls
