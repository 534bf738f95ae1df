"""The GPU suite runs: every section on a CPU with tiny sizes, its driver, and its tables. No figures are checked."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_suite  # noqa: E402
from gpu_sections import llama, oracle, report  # noqa: E402
from gpu_sections.base import Context  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    """Every section's results, as the driver collects them."""
    folder, found = tmp_path_factory.mktemp("suite"), {}
    for section in (*gpu_suite.SECTIONS, *gpu_suite.MORE):
        if section.name == "step 1B":
            continue  # as 8B
        if section.name == "decode":
            pytest.importorskip("transformers")
        module = importlib.import_module(f"gpu_sections.{section.module}")
        context = Context(torch.device("cpu"), True, 1000, folder / f"{section.name}.json")
        module.run(context, *section.arguments)
        found[section.name] = {"status": "done", **json.loads(json.dumps(context.results))}
    return found


@pytest.mark.rare
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


@pytest.mark.rare
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
        "Compilation and memory:",
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
        "step 8B": {"cases": [case], "compile_seconds": {"all": 50.0, "caches": "new"}},
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


@pytest.mark.parametrize(
    "caches, compiled, expected",
    [
        ("new", ("step 8B", "compile again"), ["yes", "yes"]),
        ("new", ("step 8B",), ["yes", "not measured"]),
        ("new", ("compile again",), ["not measured", "not measured"]),  # nothing filled its caches
        ("as they were", ("step 8B", "compile again"), ["not measured", "not measured"]),
    ],
)
def test_compilation_is_cold_or_warm_only_where_the_caches_say_so(caches, compiled, expected):
    seconds = {"step 8B": 50.0, "compile again": 5.0}
    sections = {name: {"compile_seconds": {"all": seconds[name], "caches": caches}} for name in compiled}
    found = report.aims(sections)
    assert [report.met(name, found[name]) for name in list(report.AIMS)[-2:]] == expected


def test_the_oracles_models():
    zoo = pytest.importorskip("zoo")
    assert {*oracle.MODELS} - {"plain llama"} <= {*zoo.TYPES} and {*oracle.COMPILED} <= {*oracle.MODELS}
    assert len({*oracle.MODELS}) == len(oracle.MODELS) == 12


def test_the_published_shapes():
    for name, billions in (("1B", 1.24), ("8B", 8.03)):
        with torch.device("meta"):
            model = llama.Llama(llama.SHAPES[name])
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_tied_head_stays_tied(monkeypatch):
    monkeypatch.setitem(llama.SHAPES, "tied", dataclasses.replace(llama.SHAPES["tiny"], tied=True))
    model = llama.make("tied", torch.device("cpu"), torch.float32)
    assert model.head.weight is model.embed.weight
    shape, untied = model.shape, llama.make("tiny", torch.device("cpu"), torch.float32)
    assert llama.weight_bytes(model) == llama.weight_bytes(untied)  # the table is read as the head
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in model.parameters()) == (
        shape.vocab * shape.hidden
    )


@pytest.mark.rare
def test_variants(sections):
    found = sections["variants"]
    assert found["joined_bytes"] > 0 and not found.get("skipped")
    (steps,), (prompts,) = found["steps"], found["prompts"]
    assert set(steps["step_ms"]) == {f"linears {how}, {n}" for how in ("apart", "joined") for n in (1, 4)}
    assert set(prompts["prefill_ms"]) == {"flash", "generated"}
    titles = [t.title for t in report.tables({"sections": sections, "status": "smoke", "projection": []})]
    assert any("what could be the default" in title for title in titles)


@pytest.mark.rare
def test_splits(sections):
    (sweep,) = sections["splits"]["sweeps"]
    assert sweep["us"].keys() >= {"1", "2", str(sweep["chosen"])} and min(sweep["us"].values()) > 0


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("results/*/gpu_suite*.json")), ids=lambda path: path.stem)
def test_committed_runs_can_be_shown(path, capsys):
    gpu_suite.print_report(json.loads(path.read_text()), markdown=True)
    shown = capsys.readouterr().out
    assert "NVIDIA" in shown and "| what | aim | measured | met |" in shown
