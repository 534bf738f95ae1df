"""Where triton is not installed the package imports, a CPU runs, and what needs triton says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# As if it were not installed, other editable packages' own finders included.
BLOCKED = """
import sys

def without_triton(finder):
    class Blind:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return None if name.partition(".")[0] == "triton" else finder.find_spec(name, path, target)

        def __getattr__(self, name):
            return getattr(finder, name)

    return Blind()

sys.meta_path[:] = [without_triton(finder) for finder in sys.meta_path]
"""

PROGRAM = """
import torch
import treespec_compiler as treespec
from treespec_compiler.codegen.gpu import triton_installed
from treespec_compiler.ir import ops
from treespec_compiler.ir.registry import best_kernel
from graph_cases import decoder

assert not triton_installed()
assert best_kernel(ops.tree_attention, "cuda", torch.bfloat16).name == "aten"
model = decoder()
program = treespec.tree_program(model, options={"lowering": "eager"})
cache = program.new_cache(max_tokens=16)
program.prefill([1, 2, 3], cache)
rows = program.verify(treespec.TokenTree([4, 5, 6], [-1, 0, 0]), cache)
with torch.no_grad():
    expected = model(torch.tensor([[1, 2, 3, 4, 6]]))
expected = getattr(expected, "logits", expected)[0, -1]
assert (rows[2] - expected).abs().max() <= 1e-4 * expected.abs().max()
assert "triton" not in sys.modules

from treespec_compiler.cli.main import main
assert main(["kernels", "py:graph_cases:decoder"]) == 2
"""


def test_without_triton() -> None:
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + PROGRAM], env=environment, cwd=tests, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "triton is not installed" in done.stderr and "pip install triton" in done.stderr
