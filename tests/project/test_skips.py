"""A skip for a missing tool fails in CI, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

IN_A_TEST = """
import pytest
def test_tool(): pytest.importorskip("no_such_package")
@pytest.mark.skipif(True, reason="no C++ compiler")
def test_marked(): pass
@pytest.mark.gpu
@pytest.mark.skip(reason="needs a CUDA device")
def test_gpu(): pass
@pytest.mark.xfail
def test_expected(): assert False
def test_passes(): pass
"""
IN_A_FILE = 'import pytest\npytest.importorskip("no_such_package")\ndef test_passes(): pass\n'


def outcome(folder: Path, text: str, ci: str) -> tuple[int, str]:
    (folder / "test_it.py").write_text(text)
    environment = os.environ | {"PYTHONPATH": str(TESTS), "CI": ci}
    command = [sys.executable, "-m", "pytest", "-p", "skips", "-p", "no:cacheprovider", "-n", "0", "-q", "test_it.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


@pytest.mark.parametrize("text", [IN_A_TEST, IN_A_FILE], ids=["a test", "a file"])
def test_a_skip_stays_one_outside_ci(tmp_path: Path, text: str) -> None:
    code, out = outcome(tmp_path, text, "")
    assert code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED), out
    assert "skipped" in out


def test_a_skipped_test_fails_in_ci(tmp_path: Path) -> None:
    code, out = outcome(tmp_path, IN_A_TEST, "true")
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "could not import 'no_such_package'" in out and "only a test marked gpu may skip" in out
    # test_gpu is still skipped, test_expected still an expected failure
    assert "1 passed, 1 skipped, 1 xfailed" in out


def test_a_skipped_file_fails_in_ci(tmp_path: Path) -> None:
    code, out = outcome(tmp_path, IN_A_FILE, "true")
    assert code == pytest.ExitCode.INTERRUPTED
    assert "could not import 'no_such_package'" in out and "1 error" in out
