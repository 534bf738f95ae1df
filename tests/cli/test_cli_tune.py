"""`treespec tune MODEL --device cuda` and `benchmarks/autotune.py`, on GPUs that are not there; times are made up."""

from __future__ import annotations

import dataclasses
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tuning_cases import EMPTY, microseconds

from treespec_compiler.cli import tune_kernels as cli
from treespec_compiler.cli.main import main
from treespec_compiler.codegen import tables
from treespec_compiler.codegen.gpu import tune as tuning
from treespec_compiler.codegen.gpu.tree_attention_spec import AttentionKernel
from treespec_compiler.codegen.gpu.trial import Workload
from treespec_compiler.codegen.gpu.tune import candidates
from treespec_compiler.ir.specs import MaskSpec


class TestCommand:
    @pytest.fixture(autouse=True)
    def _from_here(self, monkeypatch):
        monkeypatch.syspath_prepend(Path(__file__).parents[1])

    def test_without_a_gpu(self, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert main(["tune", "py:graph_cases:decoder", "--device", "cuda"]) == 2
        shown = capsys.readouterr().err
        assert "expected a GPU that torch can use" in shown and "treespec kernels MODEL" in shown

    @pytest.mark.parametrize(
        ("given", "text"),
        [
            ([], "option MODEL: got None, expected a model. `treespec tune demo --device cuda` measures its kernels, "),
            (["--device", "cuda"], "option MODEL: got None, expected a model"),
            (["x"], "--device: got None, expected cuda. `treespec tune x --device cuda` measures its kernels, `trees"),
            (["--latency"], "--target: got None, expected a model with --latency. Write `treespec tune --latency --t"),
            (["--latency", "x"], "MODEL: got 'x', expected its name behind --target with --latency. Write `treespec "
             "tune --latency --target x`."),
            (["--latency", "x", "--target", "y"], "MODEL: got 'x', expected no MODEL with --latency. It is for ker"),
            (["--latency", "--shapes", "1x1x2", "8x1x2"], "--shapes: got '1x1x2 8x1x2', expected no --shapes with --l"),
            (["--latency", "--target", "x", "--out", "f"], "--out: got 'f', expected no --out with --latency. It is "
             "for kernels: `treespec tune x --device cuda`."),
            (["--latency", "--target", "x", "--limit", "8"], "--limit: got 8, expected no --limit with --latency"),
            (["--latency", "--target", "x", "--limit", "0"], "--limit: got 0, expected no --limit with --latency"),
            (["--latency", "--target", "x", "--again"], "--again: got True, expected no --again with --latency"),
            (["--latency", "--target", "x", "--device", "cuda"], "--device: got 'cuda', expected no --device with"),
            (["x", "--device", "cuda", "--target", "y"], "--target: got 'y', expected no --target without --latency. "
             "It is for forward passes: `treespec tune --latency --target y`."),
            (["x", "--device", "cuda", "--draft", "y"], "--draft: got 'y', expected no --draft without --latency"),
            (["--target", "x"], "--target: got 'x', expected no --target without --latency"),
            (["x", "--device", "cuda", "--shapes", "1x1x8", "1x2"], "Invalid option --shapes: got '1x2', expected NOD"),
        ],
    )  # fmt: skip
    def test_wrong_arguments(self, given, text, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert main(["tune", *given]) == 2
        shown = capsys.readouterr()
        assert text in shown.err and shown.err.count("\n") == 1 and shown.out == ""

    def test_help_says_where_a_table_is_used(self, capsys):
        with pytest.raises(SystemExit):
            main(["tune", "--help"])
        shown = capsys.readouterr().out
        assert "CACHE/tables/tree_attention/ARCH.json" in shown and "--out wrote is used\nonce it is copied" in shown
        assert "0: all (default: 8)" in " ".join(shown.split())

    @pytest.mark.parametrize(
        ("out", "problem"),
        [
            ("file/x.json", "expected a file that can be written (File exists)"),
            ("file/deep/x.json", "expected a file that can be written (Not a directory)"),
            ("folder", "expected a file that can be written (it is no file)"),
            ("file", "expected a new file or a tuning table of tree_attention on sm_90 (found: JSONDecodeError"),
            ("table.json", "on sm_90 (found: a table for tree_attention on sm_80)"),
            ("/proc/foo.json", "expected a file that can be written ("),
            ("/dev/null", "expected a file that can be written (it is no file)"),
        ],
    )
    def test_places_are_checked_before_anything_is_converted(self, out, problem, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(cli, "gpu", lambda: torch.device("cuda", 0))
        monkeypatch.setattr(tables, "architecture", lambda device: "sm_90")
        monkeypatch.setattr(cli, "read_subject", None)
        (tmp_path / "file").write_text("notes")
        (tmp_path / "folder").mkdir()
        tables.write(tmp_path / "table.json", dataclasses.replace(EMPTY, arch="sm_80"))
        before = sorted(tmp_path.rglob("*"))
        assert main(["tune", "py:graph_cases:decoder", "--device", "cuda", "--out", str(tmp_path / out)]) == 2
        shown = capsys.readouterr().err
        assert f"Invalid option --out: got '{tmp_path / out}', expected a " in shown and problem in shown
        assert "Delete" not in shown and sorted(tmp_path.rglob("*")) == before

    def test_a_corrupt_table_in_the_cache(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("TREESPEC_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(cli, "gpu", lambda: torch.device("cuda", 0))
        monkeypatch.setattr(tables, "architecture", lambda device: "sm_90")
        path = tables.user_path(tuning.OP, "sm_90")
        path.parent.mkdir(parents=True)
        path.write_text("{")
        assert main(["tune", "py:graph_cases:decoder", "--device", "cuda"]) == 2
        assert f"Corrupt tuning table {path}" in capsys.readouterr().err

    @pytest.mark.parametrize("given", [["{}", "--device", "cuda"], ["--latency", "--target", "{}"]])
    def test_refusals_are_as_in_explain(self, given, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("TREESPEC_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(cli, "gpu", lambda: torch.device("cuda", 0))
        monkeypatch.setattr(tables, "architecture", lambda device: "sm_90")
        model = "py:graph_cases:summing"
        assert main(["tune", *(word.format(model) for word in given)]) == 1
        shown = capsys.readouterr()
        assert shown.out.startswith(f"refused  {model} (Summing)") and "mixes tokens" in shown.out
        assert "error" not in shown.err

    @pytest.fixture
    def tuned(self, monkeypatch, tmp_path):
        """Runs the command on a pretended GPU, on which `wrong` shapes have no right configuration."""
        wrong = set()
        device = SimpleNamespace(check=lambda c, s: 9.0 if str(s) in wrong else 0.0, measure=microseconds)
        monkeypatch.setattr(cli, "gpu", lambda: torch.device("cuda", 0))
        monkeypatch.setattr(tables, "architecture", lambda device: "sm_90")
        monkeypatch.setattr(tuning.Tuner, "_compiled", lambda self, configs: configs)
        from treespec_compiler.codegen.gpu import tune_device

        monkeypatch.setattr(tune_device, "DeviceBench", lambda spec, where, budget: device)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        out = tmp_path / "table.json"

        def run(*shapes, fail=()):
            wrong.clear()
            wrong.update(fail)
            arguments = ["tune", "py:graph_cases:decoder", "--device", "cuda", "--out", str(out), "--limit", "5"]
            return main([*arguments, "--shapes", *shapes]), out

        return run

    def test_every_site_of_a_model_on_a_pretended_gpu(self, capsys, tuned):
        code, out = tuned("1x1x64", "8x2x64")
        table = tables.read(out, tuning.OP, "sm_90")
        assert code == 0 and len(table.entries) == 2
        assert table.meta["device"] == "a GPU" and "triton" in table.meta["versions"]
        shown = capsys.readouterr().err.replace("\n", "")
        assert "2 entries in" in shown and "left out" not in shown
        assert f"to use it, copy it to {tables.user_path(tuning.OP, 'sm_90')}" in shown
        assert tuned("1x1x64")[0] == 0
        assert "measured before" in capsys.readouterr().err

    def test_some_shapes_are_left_out(self, capsys, tuned):
        code, out = tuned("1x1x64", "8x2x64", fail=["1x1x64"])
        shown = " ".join(capsys.readouterr().err.split())
        assert code == 0 and len(tables.read(out, tuning.OP, "sm_90").entries) == 1
        assert "left out 1 of 2 shapes: 1x1x64 of " in shown and "left out: an error of 9.0e+00" in shown

    def test_a_default_that_is_left_out_is_named(self, capsys, tuned, monkeypatch):
        def compiled(self, configs):
            self._pruned.rejected[configs[0]] = "spills (8 bytes of stack)"
            return configs[1:]

        monkeypatch.setattr(tuning.Tuner, "_compiled", compiled)
        assert tuned("1x1x64", "8x2x64")[0] == 0
        shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("default configuration")]
        assert len(shown) == 1 and ": spills (8 bytes of stack) with block_m 16, block_n " in shown[0]
        assert shown[0].startswith("default configuration left out for 1x1x64 of 2/2/8, 8x2x64 of 2/2/8: ")

    def test_all_shapes_are_left_out(self, capsys, tuned):
        code, out = tuned("1x1x64", "8x2x64", fail=["1x1x64", "8x2x64"])
        shown = " ".join(capsys.readouterr().err.split())
        assert code == 2 and not out.exists()
        assert "option --shapes: got '1x1x64, 8x2x64'" in shown and "Nothing could be tuned; 1x1x64 of " in shown
        assert tuned("1x1x64", "8x2x64", fail=["8x2x64"])[0] == 0
        assert tuned("1x1x64", "8x2x64", fail=["8x2x64"])[0] == 0  # there is an entry from before


def script():
    return Path(__file__).parents[2] / "benchmarks" / "autotune.py"


@pytest.mark.rare
def test_the_script_says_what_is_missing():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(script().parents[1])}
    done = subprocess.run([sys.executable, str(script())], env=environment, capture_output=True, text=True)
    assert (
        done.returncode == 1 and "expected a GPU that torch can use" in done.stderr and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize("given, limit", [([], 8), (["--limit", "0"], None), (["--limit", "20"], 20)])
def test_the_limit_of_the_command_and_of_the_script(monkeypatch, given, limit):
    monkeypatch.setattr(cli, "gpu", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(tables, "architecture", lambda device: "sm_90")
    asked = []
    monkeypatch.setattr(cli, "tune_kernels", lambda *_, limit, again: asked.append(limit))
    assert main(["tune", "py:graph_cases:decoder", "--device", "cuda", *given]) == 0
    monkeypatch.setattr(sys, "argv", ["autotune.py", *given])
    runpy.run_path(str(script()), run_name="__main__")
    assert asked == [limit, limit]


def test_a_limit_is_a_number(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["tune", "demo", "--device", "cuda", "--limit", "-1"])
    assert "got '-1', expected a number of configurations, 0 for all" in capsys.readouterr().err


def test_the_default_limit_bounds_what_is_compiled():
    """The numbers of its comment."""
    found = runpy.run_path(str(script()))
    kernels = [found["kernel"](text) for text in found["KERNELS"]]

    def compiled(kernel, limit):
        rows = (shape.nodes * kernel.group for shape in tuning.SHAPES)
        return len({config for n in rows for config in candidates(kernel, n, "sm_90", limit)})

    assert {compiled(kernel, None) for kernel in kernels} == {93}
    assert sorted(compiled(kernel, cli.LIMIT) for kernel in kernels) == [14, 16, 16, 20, 20, 20]


@pytest.mark.parametrize(
    "given, message",
    [
        *(
            (("--kernels", "32/8/128", text), f"got {text!r}, expected HEADS/KV_HEADS/DIM such as 32/8/128")
            for text in ("foo", "32/0/128", "32/8/0", "0/8/128", "33/8/128", "32/8/128+0", "32/8/128w0")
        ),
        (("--shapes", "1x1"), "got '1x1', expected NODESxREQUESTSxCONTEXT, such as 64x1x2048"),
        (("--shapes", "0x1x64"), "got '0x1x64', expected NODESxREQUESTSxCONTEXT, such as 64x1x2048"),
    ],
)
def test_the_script_says_which_argument_is_wrong(monkeypatch, capsys, given, message):
    monkeypatch.setattr(sys, "argv", ["autotune.py", *given])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(script()), run_name="__main__")
    assert f"argument {given[0]}: {message}" in capsys.readouterr().err


def test_the_scripts_kernels_and_shapes(monkeypatch):
    monkeypatch.setattr(cli, "gpu", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(tables, "architecture", lambda device: "sm_90")
    asked = []
    monkeypatch.setattr(cli, "tune_kernels", lambda specs, shapes, *_, **__: asked.append((specs, list(shapes))))
    half = torch.float16
    kernels = ["32/8/128", "16/16/192+128", "32/8/64w4096"]
    monkeypatch.setattr(
        sys, "argv", ["autotune.py", "--dtype", "float16", "--kernels", *kernels, "--shapes", "64x1x2048"]
    )
    runpy.run_path(str(script()), run_name="__main__")
    specs = [
        AttentionKernel(32, 8, 128, 128, half, half),
        AttentionKernel(16, 16, 192, 128, half, half),
        AttentionKernel(32, 8, 64, 64, half, half, MaskSpec(4096)),
    ]
    assert asked == [(specs, [Workload(64, 1, 2048)])]
