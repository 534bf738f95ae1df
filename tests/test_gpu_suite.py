"""The GPU suite runs: every section on a CPU with tiny sizes, its driver, and its tables. No figures are checked."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_suite  # noqa: E402
from gpu_sections import llama, report  # noqa: E402
from gpu_sections.base import Context  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    """Every section's results, as the driver collects them."""
    folder, found = tmp_path_factory.mktemp("suite"), {}
    for section in gpu_suite.SECTIONS:
        if section.name == "step 1B":
            continue  # as 8B
        if section.name == "decode":
            pytest.importorskip("transformers")
        module = importlib.import_module(f"gpu_sections.{section.module}")
        context = Context(torch.device("cpu"), True, 1000, folder / f"{section.name}.json")
        module.run(context, *section.arguments)
        found[section.name] = {"status": "done", **json.loads(json.dumps(context.results))}
    return found


def test_every_section_measures_something(sections):
    models, kernels = ([r for s in sections.values() for r in s.get(key, [])] for key in ("models", "kernels"))
    assert all(row["ok"] for row in kernels + models)
    assert {row["name"] for row in models} == {"llama", "plain llama"}
    names = {row["name"] for row in kernels}
    assert names >= {
        "llama bf16",
        "rope and append, half",
        "append",
        "commit path",
        "greedy accept",
        "stochastic accept",
    }
    if importlib.util.find_spec("triton"):
        assert sections["tune"]["shapes"][0]["us"] > 0
    one, three = sorted(sections["attention"]["sizes"], key=lambda row: row["nodes"])
    assert set(three["milliseconds"]) == {
        "treespec", "sdpa dense mask", "sdpa dense mask, packed heads", "flex attention"
    }  # fmt: skip
    assert "flash decoding (torch)" in one["milliseconds"]
    assert max(*one["errors"].values(), *three["errors"].values()) < 1e-5  # all compute the same thing
    step = sections["step 8B"]
    assert {(row["batch"], row["context"]) for row in step["cases"]} == {(2, 16), (1, 16)}
    assert step["recompiles"] == 0 and step["compile_seconds"]["all"] > 0
    assert sections["compile again"]["compile_seconds"]["all"] > 0
    loops = {row["name"]: row for row in sections["decode"]["loops"]}
    assert len(loops) == 3 and all(row["identical"] for row in loops.values() if "identical" in row)


def test_tables_of_a_run(sections, capsys):
    found = {"status": "smoke", "run": {"device": "d", "date": "now"}, "sections": sections, "projection": []}
    gpu_suite.print_report(found, markdown=True)
    assert "Aims:" not in capsys.readouterr().out  # a smoke run has no figures
    gpu_suite.print_report(found | {"status": "measured"}, markdown=True)
    shown = capsys.readouterr().out
    for text in (
        "Sections:",
        "Aims:",
        "Against the references:",
        "verify(N) / decode(1):",
        "The shipped pair, float32:",
    ):
        assert text in shown
    gpu_suite.print_report({"status": "not measured", "reason": "no GPU"}, markdown=True)
    assert "| not measured | no GPU |" in capsys.readouterr().out


def size(nodes, context, of_copy, **speedup):
    return {"nodes": nodes, "context": context, "of_copy": of_copy, "speedup": speedup}


def test_aims_and_projection():
    step = {str(n): 10 + n / 10 for n in (1, 2, 4, 8, 16, 32, 64)}
    case = {"batch": 1, "context": 2048, "step_ms": step, "over_floor": {"1": 1.2}, "verify_over_decode": {"64": 1.3}}
    flash = {"flash decoding (torch)": 0.95, "sdpa dense mask": 9.0}
    sections = {
        "step 8B": {"cases": [case], "compile_seconds": {"all": 50.0}},
        "step 1B": {"cases": [{**case, "step_ms": {n: t / 5 for n, t in step.items()}}]},
        "attention": {
            "sizes": [
                size(1, 32768, 0.9, **flash),
                size(64, 32768, 0.8, **{"sdpa dense mask": 5.0, "sdpa dense mask, packed heads": 3.5}),
                size(256, 32768, 0.1),
            ]
        },
    }
    found = report.aims(sections)
    assert [report.met(name, value) for name, value in found.items()] == [
        "no", "yes", "no", "yes", "not measured", "yes", "yes", "not measured"
    ]  # fmt: skip
    assert found["over dense-mask SDPA, N = 64, 32768 tokens"] == 3.5  # the best contender counts
    rows = report.projection(sections)
    assert rows and all(0 < row["speedup"] < row["tokens_per_step"] for row in rows)
    assert report.projection({}) == []
    assert [report.draft_levels(p, 9) for p in ("chain:5", "2,1,1", "best-first:8")] == [5, 3, 8]
    recorded = "chain:5, equal budget", "<1,1,3>", "sequoia, 6 nodes"
    assert [report.draft_levels(p, 9) for p in recorded] == [5, 3, 8]
    assert all(math.isnan(v) for v in report.aims({}).values())


def test_the_published_shapes():
    for name, billions in (("1B", 1.24), ("8B", 8.03)):
        with torch.device("meta"):
            model = llama.Llama(llama.SHAPES[name])
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)


def suite(*arguments, **environment):
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_budgets_fit_into_the_time():
    every = [max(s.budget for s in group) for group in gpu_suite.groups(gpu_suite.SECTIONS)]
    assert sum(every) <= gpu_suite.TOTAL < 480


def test_without_a_gpu(tmp_path):
    done = suite("--out", tmp_path / "out.json")
    assert done.returncode == 1 and "not measured: torch" in done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["status"] == "not measured"


def test_a_section_that_takes_too_long_leaves_the_others(tmp_path):
    """The first has no time, the second beside it has."""
    program = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import dataclasses, gpu_suite
first, second = (next(s for s in gpu_suite.SECTIONS if s.name == n) for n in ("numerics 1", "attention"))
gpu_suite.SECTIONS = (dataclasses.replace(first, budget=0.2), dataclasses.replace(second, beside=True))
"""
    script = tmp_path / "driver.py"
    script.write_text(program + "sys.argv[0] = gpu_suite.__file__\ngpu_suite.main()\n")
    out = tmp_path / "out.json"
    command = [sys.executable, str(script), "--device", "cpu", "--smoke", "--out", str(out), "--budget", "65"]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    found = json.loads(out.read_text())
    assert done.returncode == 1 and found["run"]["versions"]["torch"]
    assert found["sections"]["numerics 1"]["status"] == "out of time"
    assert found["sections"]["attention"]["status"] == "done"
