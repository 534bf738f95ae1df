"""`treespec kernels`: what it compiles, prints and refuses, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import re

import pytest

from treespec_compiler.cli import kernels
from treespec_compiler.cli.main import main

MODEL = "py:graph_cases:decoder"


@pytest.fixture(autouse=True)
def _from_here(monkeypatch):
    monkeypatch.syspath_prepend(os.path.dirname(__file__))


def test_without_triton(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "triton_installed", lambda: False)
    assert main(["kernels", MODEL]) == 2
    assert "triton is not installed" in capsys.readouterr().err


def test_wrong_arguments(capsys):
    with pytest.raises(SystemExit):
        main(["kernels", MODEL, "--target", "sm_70"])
    assert "invalid choice: 'sm_70'" in capsys.readouterr().err
    pytest.importorskip("triton")
    assert main(["kernels", MODEL, "--nodes", "0"]) == 2
    assert "--nodes: got [0]" in capsys.readouterr().err


class TestWithTriton:
    @pytest.fixture(autouse=True)
    def _triton(self):
        pytest.importorskip("triton", reason="needs triton")
        if os.environ.get("TRITON_INTERPRET") == "1":
            pytest.skip("TRITON_INTERPRET makes no kernels to compile")

    def test_refusals_are_as_in_explain(self, capsys):
        assert main(["kernels", "py:graph_cases:summing", "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert not found["converted"] and "mixes tokens" in found["reason"]

    def test_every_kernel_of_a_model(self, capsys):
        assert main(["kernels", MODEL, "--dtype", "bfloat16", "--nodes", "64", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        rows = {row["kernel"]: row for row in reversed(found["kernels"])}
        by_chance = {"residual", "chance_walk", "traversal"}
        assert set(rows) == {"attend", "merge", "append", "commit", "row_best", "greedy_walk"} | by_chance
        assert all(row["fits"] and row["registers"] > 0 for row in found["kernels"])
        assert not any(row["stack_bytes"] for name, row in rows.items() if name not in by_chance)
        assert [row["for"] for row in found["kernels"] if row["kernel"] == "attend"][-1].endswith("prompts")
        assert rows["attend"]["tensor_cores"] == "HGMMA" and not rows["append"]["tensor_cores"]
        assert rows["attend"]["for"] == "2 sites from 0 on, 64 nodes"
        assert "tree_attention" in rows["attend"]["file"] and "source" not in rows["attend"]

    def test_rotations_are_part_of_the_append(self, capsys):
        assert main(["kernels", "py:modules:RopeTril", "--kernel", "rope_append", "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["kernels"]
        assert row["for"] == "2 sites from 0 on" and row["fits"]
        assert [row["constants"][name] for name in ("HEADS", "ROTARY", "COLUMNS", "HALF")] == [4, 4, 4, True]

    def test_texts(self, capsys):
        assert main(["kernels", MODEL, "--kernel", "append", "--source", "--resources"]) == 0
        shown = capsys.readouterr().out
        assert "def append_kernel(" in shown and re.search(r"# \d+ registers, no spills, \d+ bytes shared", shown)
        assert main(["kernels", MODEL, "--kernel", "commit", "--ptx", "--target", "sm_80"]) == 0
        assert ".target sm_80" in capsys.readouterr().out
        assert main(["kernels", MODEL, "--kernel", "commit", "--sass", "--target", "gfx942"]) == 0
        assert "s_endpgm" in capsys.readouterr().out
        assert main(["kernels", MODEL, "--kernel", "nothing"]) == 2
        assert "expected one of append, attend, chance_walk, commit" in capsys.readouterr().err

    def test_table(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "120")
        assert main(["kernels", MODEL, "--kernel", "commit"]) == 0
        shown = capsys.readouterr().out
        assert "tensor cores" in shown and "all 2 sites" in shown and "kernels/commit.py" in shown.replace("\n", "")
