"""The inspection commands as a user starts them: processes, exit codes, colours, names of models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from treespec_compiler.cli.main import main

TESTS = Path(__file__).resolve().parents[1]


def treespec(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "treespec_compiler", *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent), "COLUMNS": "100", **environment},
    )


@pytest.mark.slow
@pytest.mark.rare
def test_processes_and_exit_codes() -> None:
    done = treespec("explain", "py:graph_cases:decoder", "--option", "kernels=aten")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("converted  py:graph_cases:decoder (Decoder, ") and "\x1b" not in done.stdout
    refused = treespec("opt", "py:graph_cases:summing")
    assert refused.returncode == 1 and refused.stdout == ""
    assert "aten.cumsum mixes tokens" in refused.stderr and "Traceback" not in refused.stderr
    wrong = treespec("opt", "py:graph_cases:decoder", "--pipeline", "default,nothing")
    assert wrong.returncode == 2 and wrong.stderr.startswith("treespec: error: Invalid pipeline: got no pass 'nothing'")


@pytest.mark.rare
@pytest.mark.slow
def test_a_refusal_is_all_that_is_said() -> None:
    pytest.importorskip("transformers")
    done = treespec("explain", "hf:deepseek_v4", "--random-weights", "--tiny")  # Dynamo warns about its caches
    assert done.returncode == 1 and done.stderr == "" and done.stdout.startswith("refused  hf:deepseek_v4")


@pytest.mark.rare
@pytest.mark.slow
def test_torch_trace_holds_every_pass(tmp_path: Path) -> None:
    done = treespec("opt", "py:graph_cases:decoder", "--timing", TORCH_TRACE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "bind-kernels" in done.stdout and "capture before them" in done.stdout
    text = "".join(p.read_text() for p in tmp_path.glob("*.log"))
    for name in ("capture", "normalize", "treeify", "insert_state"):
        assert f'"name": "treespec_after_{name}"' in text
    assert "def after_treeify(" in text


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("explain", "opt", "report", "passes", "diff", "reproduce", "kernels", "tune"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        shown = capsys.readouterr().out
        assert stop.value.code == 0 and "examples:" in shown and f"treespec {command}" in shown


def test_passes_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["pipeline"]
    assert [p["name"] for p in listed][:3] == ["normalize", "rows-apart", "every-position"]
    assert all(len(p["source_hash"]) == 12 and p["before"] and p["after"] for p in listed)
    assert {p["name"] for p in listed if p["optional"]} == {"fuse", "bind-kernels"}
    assert main(["passes", "--pipeline", "-fuse"]) == 0
    assert "fuse" not in capsys.readouterr().out.split()


@pytest.mark.rare
def test_model_types_and_tiny(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert main(["explain", "hf:mistral", "--random-weights", "--tiny", "--json", "--option", "kernels=aten"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["converted"] and len(found["sites"]) == 2
    assert {s["mask"] for s in found["sites"]} == {"k <= q and q - k < 4096"}
    assert {s["positions"] for s in found["sites"]} == {"rope"}
    compared = found["comparison"]
    assert compared["rows"] > 10 and compared["tokens"] > 257 and compared["seconds"] > 0
    assert compared["worst"]["rounded"] and compared["worst"]["error"] <= compared["worst"]["allowed"]
    assert main(["explain", "demo", "--tiny"]) == 2
    assert "expected a model named hf:PATH_OR_ID" in capsys.readouterr().err


@pytest.mark.rare
def test_dot_and_site(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["opt", "py:graph_cases:decoder", "--stop-after", "classify", "--option", "kernels=aten"]
    assert main([*common, "--format", "dot"]) == 0
    dot = capsys.readouterr().out
    assert dot.startswith("digraph treespec {") and '"layers.1 (folded)"' in dot
    assert main([*common, "--site", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("treespec.causal_attention(") == 1 and "nodes of other modules are not shown" in shown
    assert main([*common, "--layer", "9"]) == 2
    assert "got 9, expected 0 to 1" in capsys.readouterr().err


def test_completion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    words = "COMP_WORDS=(treespec opt --verify-each s); COMP_CWORD=3"
    asked = f'{script}\n{words}; _shtab_treespec; echo "${{COMPREPLY[@]}}"'
    shown = subprocess.run(["bash", "-c", asked], capture_output=True, text=True)
    assert shown.stdout.split() == ["spec", "semantic"] and shown.stderr == ""
    assert main(["completion", "fish"]) == 0
    assert any("-l verify-each" in x and "none spec semantic" in x for x in capsys.readouterr().out.splitlines())
