"""The GPU suite takes this machine for a GPU: what it does there, without figures."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_suite  # noqa: E402
from gpu_sections import base, numerics  # noqa: E402
from gpu_sections.base import Context  # noqa: E402

from treespec_compiler.codegen.gpu import timing  # noqa: E402
from treespec_compiler.codegen.gpu.tree_attention_spec import AttentionKernel  # noqa: E402
from treespec_compiler.codegen.gpu.trial import Workload  # noqa: E402
from treespec_compiler.codegen.gpu.tune_device import Inputs  # noqa: E402
from treespec_compiler.program import executor  # noqa: E402

pytestmark = pytest.mark.slow


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
