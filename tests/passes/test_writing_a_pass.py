"""The tutorial's code and the example passes run; entry points are found."""

from __future__ import annotations

import importlib
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from treespec_compiler.passes.framework import registry
from treespec_compiler.passes.framework.registry import registered_passes, unregister_pass

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TREESPEC_CACHE_DIR", str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT))
    before = set(registered_passes())
    yield
    for name in set(registered_passes()) - before:
        unregister_pass(name)


def test_tutorial(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "writing-a-pass.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    module = ModuleType("tutorial")  # Dynamo looks the model's module up
    monkeypatch.setitem(sys.modules, "tutorial", module)
    for block in blocks:
        # Blank lines in front give errors the page's own line numbers.
        line = text[: text.index(block)].count("\n")
        exec(compile("\n" * line + block, str(ROOT / "docs" / "writing-a-pass.md"), "exec"), vars(module))


def test_examples(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    importlib.reload(importlib.import_module("examples.count_flops")).main()
    shown = capsys.readouterr().out
    # 2 layers: q 64x64, k and v 64x32, o 64x64, three of 64x128; head 64x512; two operations each
    per_token = 2 * (2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128) + 64 * 512)
    assert f"{per_token}*T" in shown.splitlines()[-1]
    probe = importlib.import_module("examples.activation_probe")
    probe.main(lowering="eager")
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 and rows[0].startswith("model.layers.0.self_attn#0")
    assert all(len(sizes) == 2 for sizes in probe.SEEN.values())  # a prefill and a verify


def test_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packaged_pass.py").write_text(
        "import treespec_compiler as treespec\n"
        "@treespec.register_pass('packaged', after='classify', changes=False)\n"
        "def run(state):\n    return 0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    points = [
        EntryPoint("packaged", "packaged_pass:run", registry.GROUP),
        EntryPoint("gone", "no_module", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == registry.GROUP else [])
    found = registered_passes()
    assert found["packaged"].user and found["packaged"].place_after == ("classify",)
    assert "gone" not in found  # a broken package is a warning, not a broken treespec
