"""`treespec kernels`: what it compiles, prints and refuses, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from treespec_compiler.cli import inspection, kernels
from treespec_compiler.cli.main import main
from treespec_compiler.codegen import tables
from treespec_compiler.codegen.gpu.offline import Resources
from treespec_compiler.codegen.gpu.tree_attention_spec import AttentionKernel, Config

MODEL = "py:graph_cases:decoder"


@pytest.fixture(autouse=True)
def _from_here(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])


def test_without_triton(monkeypatch, capsys):
    monkeypatch.setattr(inspection, "triton_installed", lambda: False)
    assert main(["kernels", MODEL]) == 2
    assert "triton is not installed" in capsys.readouterr().err


def test_wrong_arguments(capsys):
    with pytest.raises(SystemExit):
        main(["kernels", MODEL, "--target", "sm_70"])
    assert "invalid choice: 'sm_70'" in capsys.readouterr().err
    assert main(["kernels", MODEL, "--nodes", "0"]) == 2
    assert "--nodes: got [0]" in capsys.readouterr().err


@pytest.mark.rare
def test_the_interpreter_is_refused_before_the_model_is_read():
    pytest.importorskip("triton", reason="needs triton")
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "treespec_compiler", "kernels", "py:no_such_module:model"],
        env={**os.environ, "PYTHONPATH": root, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "treespec: error: Invalid option TRITON_INTERPRET: got '1', expected no such variable: interpreted kernels "
        "cannot be compiled. Unset it.\n"
    )


def compiled(name, what, block, measured=None, stack=0, shared=0):
    listed = SimpleNamespace(
        name=name,
        what=what,
        constants={f"BLOCK_{i}": n for i, n in enumerate(block)},
        launch=SimpleNamespace(num_warps=4, num_stages=3),
        measured=measured,
        file=Path("/cache/kernels/tree_attention-0123456789abcdef.py"),
    )
    offline = SimpleNamespace(resources=Resources(128, stack, shared, 227 * 1024), has=lambda name: name == "HGMMA")
    return kernels.Compiled(listed, offline)


WIDEST = [
    compiled("attend", "32 sites from 0 on, 1 or 64 nodes", (128, 64), True, shared=118_432),
    compiled("attend", "32 sites from 0 on, prompts", (128, 64), False, stack=8, shared=300_000),
    compiled("rope_append", "32 sites from 0 on", (64, 64, 16)),
]


class TestWidths:
    def lines(self, capsys):
        kernels._print_table(inspection.console(), "a model's name", WIDEST)
        return capsys.readouterr().out.splitlines()

    def test_any_width_where_there_is_no_terminal(self, capsys, monkeypatch):
        monkeypatch.delenv("COLUMNS", raising=False)
        title, heading, first, second, third, *rest = (line.rstrip() for line in self.lines(capsys))
        assert title == "a model's name"
        names = ["kernel", "for", "block", "warps", "stages", "tuned", "registers", "spills", "shared", "tensor cores"]
        assert re.split("  +", heading) == names
        assert re.split("  +", first)[1:6] == ["32 sites from 0 on, 1 or 64 nodes", "128x64", "4", "3", "yes"]
        assert re.split("  +", second)[5:] == ["no", "128", "8 B", "300,000 B", "HGMMA"]
        assert re.split("  +", third)[2:6] == ["64x64x16", "4", "3", "-"]
        assert rest == ["", "source (`--source` prints it):", "  /cache/kernels/tree_attention-0123456789abcdef.py"]

    @pytest.mark.parametrize("width, left_out", [(100, "stages"), (80, "block, warps, stages")])
    def test_the_least_useful_columns_are_left_out(self, width, left_out, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", str(width))
        *table, note, _, _, _ = self.lines(capsys)
        assert note == f"no room for: {left_out}; --json shows everything"
        assert all(len(line) <= width for line in table)
        text = "\n".join(table)
        assert all(word in text.split() for word in ("kernel", "for", "tuned", "regs", "spills", "shared", "tensor"))
        assert "32 sites from 0 on, 1 or" in text and "32 sites from 0 on, prompts" in text  # folded, or not
        assert "rope_append" in text and "118,432 B" in text and "HGMMA" in text

    def test_the_name_and_what_it_is_for_stay(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "40")
        heading, *table = self.lines(capsys)[1:-3]
        assert heading.split() == ["kernel", "for"] and all(len(line) <= 40 for line in table)
        assert "rope_append  32 sites from 0 on" in "\n".join(table)


def test_warnings_of_dynamo_are_no_output(recwarn):
    import warnings

    inspection.quiet_torch()
    for module in ("torch._dynamo.variables.functions", "treespec_compiler.capture.capture"):
        warnings.warn_explicit("a call to a `functools.lru_cache`-wrapped function", UserWarning, "file", 1, module)
    assert len(recwarn) == 1


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

    @pytest.mark.rare
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

    @pytest.mark.rare
    def test_rotations_are_part_of_the_append(self, capsys):
        assert main(["kernels", "py:modules:RopeTril", "--kernel", "rope_append", "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["kernels"]
        assert row["for"] == "2 sites from 0 on" and row["fits"]
        assert [row["constants"][name] for name in ("HEADS", "ROTARY", "COLUMNS", "HALF")] == [4, 4, 4, True]

    @pytest.mark.rare
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

    @pytest.mark.rare
    @pytest.mark.parametrize("width", ["", "80"])
    def test_table(self, width, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", width)
        assert main(["kernels", MODEL, "--kernel", "attend"]) == 0
        shown = capsys.readouterr().out
        assert re.findall(r"^attend +2 sites from 0 on, (\w+)", shown, re.MULTILINE) == ["1", "64", "prompts"]
        assert ("stages" in shown.splitlines()[1]) == (not width) and "tree_attention-" in shown

    @pytest.mark.rare
    def test_what_was_measured_is_said(self, capsys, monkeypatch, tmp_path):
        monkeypatch.setenv("TREESPEC_CACHE_DIR", str(tmp_path))
        call = ["kernels", MODEL, "--dtype", "bfloat16", "--nodes", "64", "--json"]
        assert main(call) == 0
        assert {row["measured"] for row in json.loads(capsys.readouterr().out)["kernels"]} == {False, None}
        spec = AttentionKernel(2, 2, 8, 8, torch.bfloat16, torch.bfloat16)
        entry = tables.TuningEntry(spec.tuning_key(64, 1, 4096), Config(32, 64, 4, 2).as_dict(), 1.0)
        table = tables.TuningTable("tree_attention", "sm_90", tables.kernel_hash("tree_attention"), (entry,))
        tables.write(tables.user_path("tree_attention", "sm_90"), table)
        assert main(call) == 0
        rows = json.loads(capsys.readouterr().out)["kernels"]
        trees, prompts = (row for row in rows if row["kernel"] == "attend")
        assert trees["measured"] is True and trees["constants"]["BLOCK_M"] == 32
        assert prompts["measured"] is False  # nothing is measured with prompts
        assert {row["measured"] for row in rows if row["kernel"] != "attend"} == {None}
        tables.forget()
