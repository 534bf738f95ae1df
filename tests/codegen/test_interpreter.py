"""Runs `tests/codegen/interpreter/check_*.py`: numerics of Triton kernels in Triton's interpreter, without a GPU.

Triton reads TRITON_INTERPRET when a kernel is made, so they run in processes of their own. One file by hand:

    TRITON_INTERPRET=1 python -m pytest -n 0 tests/codegen/interpreter/check_append.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton", reason="needs triton")
if triton.__version__.startswith("3.6.") and [int(n) for n in numpy.__version__.split(".")[:2]] >= [2, 4]:
    # its loops turn an array of one number into an index, which numpy refuses since 2.4
    pytest.skip("triton 3.6's interpreter needs numpy < 2.4", allow_module_level=True)

FILES = sorted(Path(__file__).with_name("interpreter").glob("check_*.py"))
ATTENTION = [file for file in FILES if file.stem in ("check_tree_attention", "check_tree_programs")]


@pytest.mark.parametrize("files", [ATTENTION, [f for f in FILES if f not in ATTENTION]], ids=["attention", "others"])
def test_interpreter(files: list[Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", *map(str, files)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
