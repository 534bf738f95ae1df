"""Private API of torch is used where docs/torch-api.md says, and nowhere else."""

from __future__ import annotations

import re

import pytest
from imports import ROOT, modules
from private_api import private_names

from treespec_compiler.capture.capture import TESTED_TORCH

DOCUMENT = (ROOT / "docs" / "torch-api.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `([\w/.]+)` \| (.+?) \| .+ \|$", DOCUMENT, flags=re.MULTILINE))


def test_the_table_is_what_files_use() -> None:
    """Fails with the table that would be right."""
    used = {}
    for path in modules().values():
        if names := private_names(path.read_text(encoding="utf-8")):
            used[str(path.resolve().relative_to(ROOT))] = ", ".join(f"`{name}`" for name in sorted(names))
    assert used == ROWS


def test_private_api_stays_in_capture_and_lowering() -> None:
    others = {path for path in ROWS if not path.startswith("treespec_compiler/capture/")}
    assert others == {
        "codegen/gpu/grouped_linear.py",
        "treespec_compiler/backend.py",
        "treespec_compiler/cli/baselines.py",
        "treespec_compiler/ir/collectives.py",
        "treespec_compiler/ir/private_torch.py",
        "treespec_compiler/program/kept_code.py",
        "treespec_compiler/program/lowering.py",
        "treespec_compiler/program/ranks.py",
        "treespec_compiler/program/vectors.py",
    }


def test_the_range_is_the_one_that_is_installed() -> None:
    least, most = TESTED_TORCH
    assert f"torch {least}\nto {most}" in DOCUMENT
    major, minor = most.split(".")
    assert f'"torch>={least},<{major}.{int(minor) + 1}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from torch._inductor.compile_fx import compile_fx", {"torch._inductor"}),
        ("def late():\n    import torch._dynamo.config", {"torch._dynamo"}),
        ("x: torch._subclasses.FakeTensorMode", {"torch._subclasses"}),
        ("from torch import _C\ntorch._sync(x)", {"torch._C", "torch._sync"}),
        ("from torch.utils import _pytree", {"torch.utils._pytree"}),
        ("torch.__version__; model._orig_mod; torch.fx.Node; self.torch._x", set()),
    ],
)
def test_names_are_read(source: str, expected: set[str]) -> None:
    assert private_names(source) == expected
