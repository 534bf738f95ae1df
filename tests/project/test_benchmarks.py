"""The benchmark scripts run on a tiny pair, and write what docs/benchmarks.md says."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

import treespec_compiler
from treespec_compiler.codegen import cpu

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.slow


def start(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    environment.setdefault("TREESPEC_LOWERING", "eager")  # what is measured is not the question here
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def run(script: str, *arguments: object) -> str:
    done = start(script, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def shown(script: str, path: Path) -> str:
    """The tables of a report, in Markdown, made in this process: another one would take seconds to begin."""
    said, paths, arguments = io.StringIO(), [str(BENCHMARKS), *sys.path], [script, "--show", str(path), "--markdown"]
    with (
        contextlib.redirect_stdout(said),
        mock.patch.object(sys, "path", paths),
        mock.patch.object(sys, "argv", arguments),
    ):
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    return said.getvalue()


def check_run(about: dict[str, Any], threads: object = 2) -> None:
    assert about["threads"] == threads and about["commit"] and about["device"] and about["date"]
    assert about["versions"]["torch"] and about["versions"]["transformers"]
    assert about["versions"]["treespec"] == treespec_compiler.__version__


@pytest.fixture(scope="module")
def decode(pair: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("decode")
    lines = [{"module": "m", "line": i, "text": f"def f{i}(x):\n    return x"} for i in range(3)]
    (folder / "prompts.json").write_text(json.dumps(lines))
    options = [
        "--prompts",
        2,
        "--calibration",
        1,
        "--max-new-tokens",
        8,
        "--static",
        "--lowering",
        "eager",
        "--rounds",
        2,
    ]
    options += ["--policies", "1,1,3", "auto", "--candidates", "1,1", "2,1+ngram", "--output", folder / "decode.json"]
    models = ["--target", pair.target, "--draft", pair.draft, "--prompts-file", folder / "prompts.json"]
    said = run("bench_decode.py", *models, *options)
    return SimpleNamespace(shown=said, path=folder / "decode.json")


@pytest.mark.rare
def test_bench_decode(decode: SimpleNamespace) -> None:
    report = json.loads(decode.path.read_text())
    check_run(report["run"])
    names = [loop["name"] for loop in report["loops"]]
    assert {loop["kind"] for loop in report["loops"]} == {"generate", "assisted", "plain", "treespec"}
    assert names[-1] == report["settings"]["headline"] and "chosen on other prompts" in names[-1]
    assert all(len(report["runs"][name]) == 2 for name in names)
    assert [len(ids) for ids in report["ids"]] == [8, 8]
    measured = {prompt["line"] for prompt in report["prompts"]}
    assert measured.isdisjoint(prompt["line"] for prompt in report["calibration"]["prompts"])
    assert report["identity"]["identical"] and not report["identity"]["parted"]
    speculating = {loop["name"] for loop in report["loops"] if loop["kind"] == "treespec"}
    assert len(speculating) == 3 and set(report["alone"]["seconds"]) == {"decode", "draft"} | speculating
    summary = report["summary"]
    assert set(summary["best"]) == {"generate", "assisted", "plain"}
    steps = summary["steps"][names[-1]]
    assert steps["tokens_per_step"] >= 1 and steps["expected_speedup"] > 0
    assert sum(steps["share_of_wall"].values()) == pytest.approx(1, abs=0.02)
    assert "identical: yes" in decode.shown and "speed identity:" in decode.shown


@pytest.mark.rare
def test_tables_from_a_file(decode: SimpleNamespace) -> None:
    said = shown("bench_decode.py", decode.path)
    assert "| --- | ---: |" in said and "treespec without a draft" in said and "identical: yes" in said


@pytest.mark.rare
def test_bench_hybrid(tmp_path: Path) -> None:
    path = tmp_path / "hybrid.json"
    options = ["--width", 64, "--layers", 4, "--nodes", 1, 8, "--prefix", 16, "--lowering", "eager", "--rounds", 1]
    said = run("bench_hybrid.py", *options, "--burst", 2, "--output", path)
    report = json.loads(path.read_text())
    check_run(report["run"])
    for model in report["models"]:
        assert set(model["seconds"]) == {
            "transformers, one token", *(f"{way}, {n}" for way in ("treespec", "snapshots") for n in (1, 8)),
        }  # fmt: skip
        assert model["node_bytes"]["treespec"] < model["node_bytes"]["snapshots"]
    assert said.count("verify(8) / decode") == 2 == shown("bench_hybrid.py", path).count("verify(8) / decode")


@pytest.mark.rare
def test_bench_verify(pair: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "verify.json"
    options = ["--nodes", 1, 2, 4, "--prefix", 16, "--static", "--lowering", "eager", "--rounds", 2, "--output", path]
    said = run("bench_verify.py", "--models", pair.target, *options)
    report = json.loads(path.read_text())
    check_run(report["run"])
    (model,) = report["models"]
    assert set(model["verify"]) == {"1", "2", "4"} and set(model["plain"]) == set(model["seconds"])
    assert all(len(values) == 16 for values in model["seconds"].values())
    (figures,) = report["summary"]
    assert min(figures["verify_over_decode"].values()) == 1.0  # decode is the fastest of them
    assert "verify(N) / decode" in said
    assert "verify(N) / decode" in shown("bench_verify.py", path)


@pytest.mark.rare
def test_bench_compile(tmp_path: Path) -> None:
    path = tmp_path / "compile.json"
    said = run("bench_compile.py", "--layers", 1, 2, "--output", path)
    report = json.loads(path.read_text())
    assert [r["layers"] for r in report["runs"]] == [1, 2] and report["run"]["commit"]
    first, second = report["runs"]
    assert list(first["passes"]) == list(second["passes"]) and "token locality" in first["passes"]
    assert second["passes"]["recognize attention"]["matches"] == 2 and second["nodes"] > first["nodes"]
    assert 0 < report["summary"]["share_of_passes"]["2"] < 1
    assert "CPU seconds =" in said and "CPU seconds =" in shown("bench_compile.py", path)


@pytest.fixture(scope="module")
def folders(pair: SimpleNamespace) -> list[object]:
    """Arguments that name the tiny pair, with its own held-out prompts, and as little work as there is."""
    lines = [{"text": f"def f{i}(x):\n    return x"} for i in range(5)]
    (pair.folder / "heldout.json").write_text(json.dumps(lines))
    models = ["--target", pair.folder / "target", "--draft", pair.folder / "draft"]
    return [*models, "--prompts", 2, "--max-new-tokens", 8]


@pytest.mark.rare
def test_bench_policies(folders: list[object], tmp_path: Path) -> None:
    path = tmp_path / "policies.json"
    few = ["--quick", "--repeats", 1, "--temperatures", 0, "--lowering", "eager"]
    said = run("bench_policies.py", *folders, *few, "--output", path)
    report = json.loads(path.read_text())
    check_run(report["meta"], report["meta"]["threads"])
    assert {e["tokens"] for e in report["entries"]} == {16}  # two prompts of eight tokens
    assert {"plain", "auto", "<1,1,3>"} <= {e["policy"] for e in report["entries"]}
    assert path.with_suffix(".svg").read_text().startswith("<svg") and "x plain" in said


@pytest.mark.rare
def test_bench_verifiers(folders: list[object], tmp_path: Path) -> None:
    path = tmp_path / "verifiers.json"
    said = run("bench_verifiers.py", *folders, "--seeds", 1, "--verifiers", "naive", "--output", path)
    report = json.loads(path.read_text())
    check_run(report["meta"], report["meta"]["threads"])
    assert [e["verifier"] for e in report["entries"]] == ["naive"] * 5
    assert all(e["tokens_per_step"] >= 1 for e in report["entries"]) and "tokens/step" in said


@pytest.mark.rare
def test_bench_real(pair: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREESPEC_LOWERING", "eager")
    model = tmp_path / "model"
    shutil.copytree(pair.target.removeprefix("hf:"), model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}\n")
    asked = [("coding", 121, "def f(x):"), ("qa", 300, "x = 1\nx = 1\nx ="), ("qa", 301, "import os")]
    lines = [json.dumps({"category": c, "question_id": n, "turns": [text]}) for c, n, text in asked]
    (tmp_path / "question.jsonl").write_text("\n".join(lines))
    given = ["--questions", tmp_path / "question.jsonl", "--model", f"hf:{model}", "--each", 1, "--max-new-tokens", 8]
    path = tmp_path / "real.json"
    said = run("bench_real.py", *given, "--static", "--fewer", 1, "--output", path)
    report = json.loads(path.read_text())
    check_run(report["run"])
    greedy, sampled = report["kinds"]
    assert [q["task"] for q in greedy["questions"]] == ["chat", "qa"] and greedy["parted"] == []
    assert all(1 <= q["answer"] <= 8 for q in greedy["questions"])
    assert set(greedy["runs"]) - set(sampled["runs"]) == {"Hugging Face prompt lookup"}
    lengths = [q["answer"] for q in greedy["questions"]]
    assert all([r["tokens"] for r in runs] == lengths for runs in greedy["runs"].values())
    assert "Tokens a step, greedy" in said and "temperature 0.7" in said
    again = shown("bench_real.py", path)
    assert "| treespec recycle |" in again


def test_bench_real_names_what_it_cannot_read(tmp_path: Path) -> None:
    assert "expected Spec-Bench's question.jsonl" in start("bench_real.py").stderr


@pytest.mark.rare
def test_bench_cpu_peers(pair: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the peers, which are named and left out."""
    monkeypatch.setenv("TREESPEC_LOWERING", "eager")
    model = tmp_path / "model"
    shutil.copytree(pair.target.removeprefix("hf:"), model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}\n")
    asked = json.dumps({"category": "qa", "question_id": 300, "turns": ["x = 1\nx = 1\nx ="]})
    (tmp_path / "question.jsonl").write_text(asked)
    bare = tmp_path / "python"  # without installed packages
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    path = tmp_path / "peers.json"
    given = ["--questions", tmp_path / "question.jsonl", "--model", f"hf:{model}", "--gguf", tmp_path / "none.gguf"]
    given += [
        "--openvino",
        f"int8={tmp_path}",
        "--peers",
        bare,
        "--storages",
        "exact",
        "--max-new-tokens",
        6,
        "--out",
        path,
    ]
    said = run("bench_cpu_peers.py", *given)
    report = json.loads(path.read_text())
    check_run(report["run"])
    assert str(tmp_path) not in report["run"]["command"]
    loops = ["Hugging Face", "treespec exact"]
    assert list(report["runs"]) == [name + more for name in loops for more in ("", ", prompt lookup")]
    ids = [run["ids"] for runs in report["runs"].values() for run in runs]
    assert len(ids) == 4 and all(each == ids[0] for each in ids) and report["bandwidth"] > 1e9
    assert set(report["steps"]) == {"treespec exact"}
    missing = ["llama.cpp Q4_1", "OpenVINO int8"]
    assert [each.partition(":")[0] for each in dict.fromkeys(report["missing"])] == missing
    assert all(f"Left out: {name}" in said for name in missing)
    assert "| treespec exact |" in shown("bench_cpu_peers.py", path)


def test_bench_cpu_peers_names_what_it_cannot_read() -> None:
    assert "expected Spec-Bench's question.jsonl" in start("bench_cpu_peers.py").stderr


@pytest.mark.rare
def test_bench_linear(tmp_path: Path) -> None:
    if not cpu.load():
        pytest.skip("no C++ compiler")
    path = tmp_path / "linear.json"
    run("bench_linear.py", "--threads", 1, "--repeats", 3, "--inductor", 0, "--output", path)
    report = json.loads(path.read_text())
    check_run(report["meta"], [1])
    assert {e["name"] for e in report["entries"]} == {"treespec", "aten"}


@pytest.mark.rare
def test_bench_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREESPEC_LOWERING", "eager")  # a cold run builds enough without Inductor's
    path = tmp_path / "start.json"
    run("bench_start.py", "--tokens", 3, "--rounds", 1, "--output", path)
    report = json.loads(path.read_text("utf-8"))
    assert report["run"]["commit"] and report["run"]["versions"]["treespec"] == treespec_compiler.__version__
    names = [each["name"] for each in report["runs"]]
    assert names[:3] == ["treespec cold", "treespec warm", "Hugging Face generate"]
    assert ("llama.cpp" in names) == (report["left_out"] is None)
    assert names[-3:] == ["treespec compile", "treespec, saved program", "treespec, compiled folder"]
    said = [each["tokens"] for each in report["runs"] if each["name"] not in ("llama.cpp", "treespec compile")]
    assert all(len(tokens) == 3 for tokens in said) and len(set(map(tuple, said))) == 1
    pieces = [[piece["name"] for piece in each["pieces"]] for each in report["runs"][:2]]
    assert pieces[0] == pieces[1] and pieces[0][:2] == ["imports", "load"] and pieces[0][-1] == "other tokens"
    said = shown("bench_start.py", path)
    assert "treespec cold, piece by piece" in said and "said the same" in said


def test_bench_start_takes_no_zeros() -> None:
    done = start("bench_start.py", "--rounds", 0)
    assert done.returncode == 2 and "at least one of --tokens, --rounds and --cold" in done.stderr


@pytest.mark.rare
def test_bench_pages(tmp_path: Path) -> None:
    path = tmp_path / "pages.json"
    few = ("--sizes", 16, 64, "--requests", 2, "--prompt-tokens", 40, "--shared", 20, "--new-tokens", 4, "--rounds", 1)
    said = run("bench_pages.py", *few, "--output", path)
    report = json.loads(path.read_text("utf-8"))
    assert report["same"] and [loop["page_size"] for loop in report["loops"]] == [16, 64]
    assert all(loop["places"] == loop["pages"] * loop["page_size"] > 0 for loop in report["loops"])
    assert "tokens a page" in said and "| --- |" in shown("bench_pages.py", path)


@pytest.mark.parametrize("script", ["bench_decode.py", "bench_verify.py", "bench_compile.py"])
def test_showing_a_file_of_something_else(script: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"run": {}}')
    done = start(script, "--show", path)
    assert done.returncode == 1 and "expected a file that this script wrote: it has no" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "script, arguments, text",
    [
        ("bench_verify.py", ("--show", ROOT / "benchmarks/results/cpu/decode.json"), "it is of the benchmark 'decode'"),
        ("bench_decode.py", ("--show", ROOT / "benchmarks/results/cpu/verify.json"), "it has no 'loops'"),
        ("bench_policies.py", ("--target", "x"), "got --target alone, expected --draft as well"),
        ("bench_verifiers.py", ("--draft", "x"), "got --draft alone, expected --target as well"),
    ],
)
def test_wrong_arguments_end_in_one_line(script, arguments, text):
    done = start(script, *arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert text in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.rare
def test_bench_batch(pair: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "batch.json"
    arguments = ["--requests", 1, 3, "--new-tokens", 6, "--rounds", 1, "--prompt-tokens", 20, "--alone", "--waves", 2]
    arguments += ["--control", "--chains", "chain:2", "--trees", "2,1", "--target", pair.target, "--draft", pair.draft]
    said = run("bench_batch.py", *arguments, "--output", path)
    report = json.loads(path.read_text())
    check_run(report["run"])
    assert [batch["requests"] for batch in report["batches"]] == [1, 3]
    assert all(all(batch["same"].values()) for batch in report["batches"])
    assert set(report["summary"]) == {"without a draft", "best chain", "best tree", "auto"}
    assert "auto over plain" in said and "nobody" in said
    assert "without a draft, again" in said and all(
        loop["cpu"][0] > 0 for b in report["batches"] for loop in b["loops"]
    )
    assert path.with_suffix(".svg").read_text().startswith("<svg")
    assert "| --- | ---: |" in shown("bench_batch.py", path)


@pytest.mark.rare
def test_simulate_scale(tmp_path: Path) -> None:
    """It says that it is calculated; one GPU's step is the measured one; more ranks of a stage compute less."""
    file, chart = tmp_path / "scale.json", tmp_path / "scale.svg"
    said = run("simulate_scale.py", "--output", file, "--chart", chart)
    report = json.loads(file.read_text())
    check_run(report["run"], threads=1)
    assert report["status"] == "calculated, not measured" and "CALCULATED, not measured" in said
    assert "not measured" in chart.read_text() and all(link["source"] for link in report["links"])
    rows = {(r["model"], r["tp"], r["pp"]): r for r in report["steps"] if r["within"] in ("", "NVLink 4")}
    measured = json.loads((BENCHMARKS / "results/nvidia-h200/gpu_suite.json").read_text())["sections"]["step 8B"]
    assert rows["Llama 8B", 1, 1]["plain"] == pytest.approx(1e3 / measured["cases"][0]["step_ms"]["1"], rel=0.02)
    assert not rows["Llama 70B", 1, 1]["fits"] and rows["Llama 70B", 2, 1]["fits"]
    for model in ("Llama 8B", "Llama 70B", "MoE of 100B"):
        compute = [rows[model, tp, 1]["compute"] for tp in (1, 2, 4, 8)]
        assert compute == sorted(compute, reverse=True) and rows[model, 1, 2]["compute"] == compute[0]
        assert (
            rows[model, 4, 1]["collectives"] > rows[model, 2, 1]["collectives"] > rows[model, 1, 1]["collectives"] == 0
        )
        assert rows[model, 2, 4]["bytes"] == pytest.approx(rows[model, 1, 1]["bytes"] / 8)
    assert shown("simulate_scale.py", file).count("tp=8,pp=4") == 6


@pytest.mark.rare
def test_bench_offload(tmp_path: Path) -> None:
    """A made-up model over a slow bucket: every step reads all that is streamed, in no less than the floor."""
    file = tmp_path / "offload.json"
    made_up = ["--random-gb", 0.0012, "--width", 64, "--tokens", 3, "--lowering", "eager", "--no-peer"]
    said = run("bench_offload.py", *made_up, "--rates", 0.02, "--dir", tmp_path, "--output", file)
    report = json.loads(file.read_text())
    check_run(report["run"], threads=report["run"]["threads"])
    [row] = report["rows"]
    assert row["loop"] == "one token" and row["steps"] == 2 and row["floor"] == report["streamed"]["bytes"] / 2e7
    assert report["streamed"]["layers"] >= 3 and "of the floor" in said
    again = shown("bench_offload.py", file)
    assert again.count("| one token |") == 1


@pytest.mark.rare
def test_bench_boosted(pair: SimpleNamespace, tmp_path: Path) -> None:
    target = shutil.copytree(pair.folder / "target", tmp_path / "target")
    (tmp_path / "heldout.json").write_text(json.dumps([{"text": "def f(x):\n    return x"}]))
    path = tmp_path / "boosted.json"
    arguments = ["--members", 2, "--steps", 2, "--pieces", 6, "--text-tokens", 6, "--layers", 1, "--hidden", 16]
    arguments += ["--prompts", 1, "--max-new-tokens", 6, "--depth", 2, "--target", target, "--work", tmp_path / "work"]
    said = run("bench_boosted.py", *arguments, "--output", path)
    report = json.loads(path.read_text())
    check_run(report["meta"], threads=report["meta"]["threads"])
    assert [(entry["models"], entry["tree"]) for entry in report["entries"]] == [(1, "1,1"), (2, "1,1"), (1, "2,1")]
    assert all(entry["tokens_per_step"] >= 1 and entry["nodes"] <= 4 for entry in report["entries"])
    assert "tokens a step" in said
