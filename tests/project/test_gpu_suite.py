"""The GPU suite runs: every section on a CPU with tiny sizes, its driver, and its tables. No figures are checked."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_suite  # noqa: E402
from gpu_sections import base, llama, numerics, oracle, report  # noqa: E402
from gpu_sections.base import Context  # noqa: E402

from treespec_compiler.codegen.gpu import timing  # noqa: E402
from treespec_compiler.codegen.gpu.tree_attention_spec import AttentionKernel  # noqa: E402
from treespec_compiler.codegen.gpu.trial import Workload  # noqa: E402
from treespec_compiler.codegen.gpu.tune_device import Inputs  # noqa: E402
from treespec_compiler.program import executor  # noqa: E402

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


class OnGPU(Context):
    """The CPU, for a section that takes it for a GPU."""

    on_gpu = True  # type: ignore[assignment]


class Stream:
    def __init__(self, device=None, priority=0):
        pass

    def wait_stream(self, stream):
        assert isinstance(stream, Stream)


class Event:
    def __init__(self, enable_timing=False, blocking=False, interprocess=False, external=False):
        assert enable_timing

    def record(self, stream=None):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, end_event):
        assert isinstance(end_event, Event)
        return 1.0


class Graph:
    def replay(self):
        pass


@contextlib.contextmanager
def graph(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
    assert isinstance(cuda_graph, Graph) and isinstance(stream, Stream)
    yield


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """`torch.cuda` as the suite uses it; every call takes a millisecond, and kernels are ATen's."""
    properties = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)
    stand_ins = {
        "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": graph,
        "stream": lambda stream: contextlib.nullcontext(), "device": lambda device: contextlib.nullcontext(),
        "current_stream": lambda device=None: Stream(), "synchronize": lambda device=None: None,
        "graph_pool_handle": lambda: (0, 1), "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device=None: None, "max_memory_allocated": lambda device=None: 5,
        "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
        "get_device_properties": lambda device=None: properties,
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        parameters = inspect.signature(getattr(torch.cuda, name)).parameters
        if not inspect.isclass(stand_in):
            assert set(inspect.signature(stand_in).parameters) <= {*parameters, "pool", "stream", "device"}, name
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 1024)
    monkeypatch.setattr(base, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(Inputs, "attend", lambda self, config=None, splits=None: numerics.eager_attention(self))
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **more: f if f is flex_attention else compile_(f, **more))
    monkeypatch.setattr(executor, "obstacle", lambda graph, device: "")
    monkeypatch.setenv("TREESPEC_CACHE_DIR", str(tmp_path / "cache"))
    timing._flush_buffer.cache_clear()
    yield
    timing._flush_buffer.cache_clear()


def on_gpu(name, path, *arguments):
    """A section's results where it takes this machine for a GPU."""
    context = OnGPU(torch.device("cpu"), True, 1000, path / f"{name}.json")
    importlib.import_module(f"gpu_sections.{name}").run(context, *arguments)
    assert "skipped" not in context.results
    return json.loads(context.path.read_text())


@pytest.mark.parametrize("name", ["numerics", "attention"])
def test_kernels_on_a_pretended_gpu(pretended, tmp_path, name):
    found = on_gpu(name, tmp_path)
    if name == "numerics":
        assert all(row["ok"] for row in found["kernels"])
        return
    for row in found["sizes"]:
        assert set(row["milliseconds"].values()) == {1.0} and len(row["milliseconds"]) >= 3
        assert row["of_copy"] > 0


def test_steps_on_a_pretended_gpu(pretended, tmp_path):
    found = on_gpu("steps", tmp_path, "8B")
    for case in found["cases"]:
        assert case["device_ms"] == {"1": 1.0, "4": 1.0} and case["peak_bytes"] == 5
    assert found["graphs"]["captures"] == 4 and found["graphs"]["off"] == "" and found["recompiles"] == 0


def test_tuning_on_a_pretended_gpu(pretended, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    tune = importlib.import_module("gpu_sections.tune")
    monkeypatch.setattr(tune, "SPEC", AttentionKernel(4, 2, 16, 16, torch.bfloat16, torch.bfloat16))
    monkeypatch.setattr(tune, "SHAPES", (Workload(2, 1, 16),))
    monkeypatch.setattr(tune, "LIMIT", 2)
    (row,) = on_gpu("tune", tmp_path)["shapes"]
    assert row["us"] == row["default_us"] == 1000.0
    assert json.loads((tmp_path / "tree_attention-sm_90.json").read_text())["entries"]


def test_a_run_is_kept_by_device(pretended, monkeypatch):
    answer = types.SimpleNamespace(returncode=0, stdout="570.86, 1980 MHz, 2619 MHz, 700.00 W, 31\n")
    monkeypatch.setattr(gpu_suite.subprocess, "run", lambda *_, **__: answer)
    about = gpu_suite.about("cuda")
    assert about["device"] == "NVIDIA H100 80GB HBM3" and about["nvidia_smi"]["driver_version"] == "570.86"
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py"])
    folder = gpu_suite.RESULTS / "nvidia-h100-80gb-hbm3"
    assert gpu_suite.results_path(gpu_suite.parse()) == folder / "gpu_suite.json"
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--only", "step 8B", "tune"])
    assert gpu_suite.results_path(gpu_suite.parse()) == folder / "gpu_suite-step-8b-tune.json"


def test_a_tied_head_stays_tied(monkeypatch):
    monkeypatch.setitem(llama.SHAPES, "tied", dataclasses.replace(llama.SHAPES["tiny"], tied=True))
    model = llama.make("tied", torch.device("cpu"), torch.float32)
    assert model.head.weight is model.embed.weight
    shape, untied = model.shape, llama.make("tiny", torch.device("cpu"), torch.float32)
    assert llama.weight_bytes(model) == llama.weight_bytes(untied)  # the table is read as the head
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in model.parameters()) == (
        shape.vocab * shape.hidden
    )


def suite(*arguments, **environment):
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "status, kernel, model, code, last",
    [
        ("done", True, True, 0, "0 of 2 sections not done, 0 of 3 checks wrong"),
        ("done", False, True, 1, "0 of 2 sections not done, 1 of 3 checks wrong"),
        ("done", False, False, 1, "0 of 2 sections not done, 2 of 3 checks wrong"),
        ("failed", True, True, 1, "1 of 2 sections not done, 0 of 3 checks wrong"),
    ],
)
def test_wrong_numbers_are_failures(monkeypatch, capsys, status, kernel, model, code, last):
    rows = [{"name": "a", "ok": True, "error": 0.0}, {"name": "b", "ok": kernel, "error": "ValueError: b"}]
    sections = {
        "numerics 1": {"status": "done", "kernels": rows},
        "oracle 1": {"status": status, "models": [{"name": "c", "lowering": "eager", "ok": model, "error": math.nan}]},
    }
    found = {"status": "smoke", "run": {"device": "d", "date": "now"}, "sections": sections, "projection": []}
    monkeypatch.setattr(gpu_suite, "run", lambda arguments, path: found)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--device", "cpu", "--smoke"])
    with pytest.raises(SystemExit) as ended:
        gpu_suite.main()
    assert ended.value.code == code
    assert capsys.readouterr().out.splitlines()[-1] == last


def asked(monkeypatch, *only):
    """Names of the sections that a run starts."""
    started = []

    class Running:
        def __init__(self, arguments, section, budget, folder, together):
            self.section = section
            started.append(section.name)

        def results(self):
            return {"status": "done"}

    monkeypatch.setattr(gpu_suite, "Running", Running)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--device", "cpu", "--smoke", "--only", *only])
    gpu_suite.run(gpu_suite.parse(), None)
    return started


def test_a_bare_name_stands_for_all_parts(monkeypatch):
    assert asked(monkeypatch, "attention", "numerics") == ["numerics 1", "numerics 2", "numerics 3", "attention"]
    assert asked(monkeypatch, "oracle 3", "step") == ["oracle 3", "step 8B", "step 1B"]
    assert asked(monkeypatch, "step 8B", "compile again", "variants") == ["step 8B", "compile again", "variants"]


def test_all_adds_what_compiles_to_the_checks():
    plain, everything = gpu_suite.asked((), False), gpu_suite.asked((), True)
    assert plain == list(gpu_suite.SECTIONS) and {*everything} - {*plain} == {gpu_suite.VARIANTS}
    checks, *timed = gpu_suite.groups(everything)
    assert gpu_suite.VARIANTS in checks and all(len(group) == 1 for group in timed)


def test_processes_that_run_together_share_the_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py"])
    arguments = gpu_suite.parse()

    def threads(together):
        return gpu_suite.environment(arguments, gpu_suite.SECTIONS[0], tmp_path, together).get("OMP_NUM_THREADS")

    assert [threads(n) for n in (1, 7, 32)] == [None, "2", "1"]


@pytest.mark.parametrize(
    "given, message",
    [
        (("--only", "numeric"), "got 'numeric', expected numerics, oracle, "),
        (("--only", "oracle 9"), "or one part such as 'numerics 1'"),
        (("--budget", "-5"), "got '-5', expected seconds, more than 0"),
        (("--budget", "inf"), "got 'inf', expected seconds, more than 0"),
        (("--budget", "long"), "got 'long', expected seconds, more than 0"),
    ],
)
def test_arguments_that_nothing_can_be_done_with(monkeypatch, capsys, given, message):
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", *given])
    with pytest.raises(SystemExit, match="2"):
        gpu_suite.parse()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, why",
    [
        (None, "No such file or directory"),
        ('{"status": "meas', "not JSON: Unterminated string"),
        ("[]", "it has no 'status'"),
        ('{"run": {}}', "it has no 'status'"),
    ],
)
def test_showing_what_is_no_run(monkeypatch, tmp_path, text, why):
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--show", str(path)])
    with pytest.raises(SystemExit) as ended:
        gpu_suite.main()
    message = ended.value.code
    assert message.startswith(f"got {str(path)!r}, expected a file that this script wrote: {why}")
    assert "\n" not in message


def test_budgets_fit_into_the_time():
    every = [max(s.budget for s in group) for group in gpu_suite.groups(gpu_suite.SECTIONS)]
    assert sum(every) <= gpu_suite.TOTAL < 480


def test_variants(sections):
    found = sections["variants"]
    assert found["joined_bytes"] > 0 and not found.get("skipped")
    (steps,), (prompts,) = found["steps"], found["prompts"]
    assert set(steps["step_ms"]) == {f"linears {how}, {n}" for how in ("apart", "joined") for n in (1, 4)}
    assert set(prompts["prefill_ms"]) == {"flash", "generated"}
    titles = [t.title for t in report.tables({"sections": sections, "status": "smoke", "projection": []})]
    assert any("what could be the default" in title for title in titles)


def test_splits(sections):
    (sweep,) = sections["splits"]["sweeps"]
    assert sweep["us"].keys() >= {"1", "2", str(sweep["chosen"])} and min(sweep["us"].values()) > 0


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("results/*/gpu_suite*.json")), ids=lambda path: path.stem)
def test_committed_runs_can_be_shown(path, capsys):
    gpu_suite.print_report(json.loads(path.read_text()), markdown=True)
    shown = capsys.readouterr().out
    assert "NVIDIA" in shown and "| what | aim | measured | met |" in shown


def test_without_a_gpu(tmp_path):
    done = suite("--out", tmp_path / "out.json")
    assert done.returncode == 1 and "not measured: torch" in done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["status"] == "not measured" and found["run"]["date"] and found["run"]["versions"]["treespec"]


def test_a_section_that_takes_too_long_leaves_the_others(tmp_path):
    """The first has no time, the second beside it has."""
    program = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import dataclasses, gpu_suite
first, second = (next(s for s in gpu_suite.SECTIONS if s.name == n) for n in ("numerics 1", "attention"))
gpu_suite.SECTIONS = (dataclasses.replace(first, budget=0.2), dataclasses.replace(second, beside=True, budget=900))
"""
    script = tmp_path / "driver.py"
    script.write_text(program + "sys.argv[0] = gpu_suite.__file__\ngpu_suite.main()\n")
    out = tmp_path / "out.json"
    command = [sys.executable, str(script), "--device", "cpu", "--smoke", "--out", str(out), "--budget", "900"]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    found = json.loads(out.read_text())
    assert done.returncode == 1 and found["run"]["versions"]["torch"]
    assert found["sections"]["numerics 1"]["status"] == "out of time"
    assert found["sections"]["attention"]["status"] == "done"
