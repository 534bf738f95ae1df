"""What `explain` and `opt` print, word for word.

Regenerate after a change that is meant: TREESPEC_REGENERATE=1 python -m pytest tests/passes/test_golden.py
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from treespec_compiler.cli.main import main

FOLDER = Path(__file__).parent / "golden"
HEADER = "# regenerate: TREESPEC_REGENERATE=1 python -m pytest tests/passes/test_golden.py\n"
MEASURED = re.compile(r'(tokens in |"seconds": |at most (?=\d)|"error": )[\d.]+(e-?\d+)?')
CPU = ["--option", "kernels=aten"]

CASES = {
    "explain-decoder": ["explain", "py:graph_cases:decoder", *CPU],
    "explain-windowed": ["explain", "py:graph_cases:windowed", *CPU],
    "explain-summing": ["explain", "py:graph_cases:summing", *CPU],
    "explain-decoder-json": ["explain", "py:graph_cases:decoder", "--json", *CPU],
    "opt-decoder": ["opt", "py:graph_cases:decoder", *CPU],
    "opt-windowed-site": ["opt", "py:graph_cases:windowed", "--stop-after", "classify", *CPU],
    "opt-deep-layer": ["opt", "py:graph_cases:deep", "--layer", "7", "--print-after", "treeify", *CPU],
}


@pytest.mark.parametrize("name", CASES)
def test_output(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setenv("COLUMNS", "100")
    code = main(CASES[name])
    shown = capsys.readouterr().out
    assert code == (1 if "summing" in name else 0)
    shown = MEASURED.sub(r"\1#", HEADER + "\n".join(row.rstrip() for row in shown.splitlines()) + "\n")
    path = FOLDER / f"{name}.txt"
    if os.environ.get("TREESPEC_REGENERATE"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(shown)
    assert str(Path(__file__).parents[2]) not in shown
    assert shown == path.read_text()


def test_folding_keeps_a_deep_model_short() -> None:
    lines = (FOLDER / "opt-deep-layer.txt").read_text().splitlines()
    assert len(lines) < 120
    assert any("layers.7: " in line and "31 more of this structure" in line for line in lines)
    assert [line for line in lines if "folded" in line] == [
        "    # layers.0 to layers.6: 147 nodes, structure of layers.7, folded",
        "    # layers.8 to layers.31: 504 nodes, structure of layers.7, folded",
    ]
