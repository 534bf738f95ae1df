"""Which graphs wait for the device and so cannot be recorded, and the recorder's own promises; without a GPU."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from unittest import mock

import native_cache
import pytest
import torch
import zoo
from oracles import EAGER
from torch import fx

from treespec_compiler import tree_program
from treespec_compiler.ir import ops
from treespec_compiler.ir.registry import kernel_of, kernels
from treespec_compiler.program import cuda_graphs

aten = torch.ops.aten


REFERENCE = {**EAGER, "kernels": "reference"}


@pytest.mark.parametrize(("dtype", "kernel"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)])
def test_grouped_products_wait_where_torch_has_no_kernel_for_them(dtype, kernel, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "has_kernel", lambda device: kernel)
    graph = fx.Graph()
    node = graph.call_function(torch.ops.aten._grouped_mm.default, tuple(graph.placeholder(n) for n in "xwo"))
    node.meta["val"] = torch.zeros(2, 2, dtype=dtype)
    why = cuda_graphs.obstacle(graph, torch.device("cuda"))
    assert why == ("" if kernel and dtype is torch.bfloat16 else "aten._grouped_mm.default waits for the device")


@pytest.mark.parametrize("op", [torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default], ids=str)
def test_ops_that_read_back_wait(op):
    graph = fx.Graph()
    graph.call_function(op, (graph.placeholder("x"),))
    assert "waits for the device" in cuda_graphs.obstacle(graph, torch.device("cuda"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("op", ["index", "index_put"])
def test_indexing_waits_for_masks_only(op, dtype):
    """`index` is tagged as if its shape always depended on data."""
    graph = fx.Graph()
    x, at, value = (graph.placeholder(n) for n in ("x", "at", "value"))
    at.meta["val"] = torch.zeros(3, dtype=dtype)
    target, more = (aten.index.Tensor, ()) if op == "index" else (aten.index_put.default, (value,))
    graph.call_function(target, (x, [None, at], *more))
    why = cuda_graphs.obstacle(graph, torch.device("cuda"))
    assert why == (f"{target} waits for the device" if dtype is torch.bool else "")


def test_a_rope_table_read_by_positions_does_not_wait(monkeypatch):
    model = zoo.spread(native_cache.CachedDecoder())
    example = (torch.arange(9)[None] % 5, torch.arange(9))
    found = tree_program(model, example, roles={"input_pos": "positions"}, options=REFERENCE)
    graph = found.graph_module.graph
    assert any(node.target is aten.index.Tensor for node in graph.nodes)
    capturable = replace(kernel_of(torch.ops.treespec_aten.tree_attention.default), capturable=True)
    monkeypatch.setattr(cuda_graphs, "kernel_of", lambda target: capturable)
    assert cuda_graphs.obstacle(graph, torch.device("cuda")) == ""


class FakeGraph(contextlib.AbstractContextManager):
    """`torch.cuda` as recordings use it: streams are names, and a recording that became invalid ends as a real one."""

    def __init__(self, monkeypatch):
        self.stream, self.pools, self.recorded, self.broken = "the caller's", 0, [], False
        stand_ins = {
            "device": lambda device: contextlib.nullcontext(),
            "graph_pool_handle": self.new_pool,
            "Stream": lambda: mock.Mock(name="side"),
            "current_stream": lambda: mock.Mock(name="here"),
            "stream": lambda stream: contextlib.nullcontext(),
            "set_stream": lambda stream: setattr(self, "stream", "the caller's"),
            "CUDAGraph": lambda: mock.Mock(replay=lambda: None),
            "graph": self.graph,
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def new_pool(self):
        self.pools += 1
        return self.pools

    def graph(self, graph, pool, stream, capture_error_mode):
        self.recorded.append(pool)
        return self

    def __enter__(self):
        self.stream = "the recorder's"

    def __exit__(self, *_):
        if self.broken:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.stream = "the caller's"


def test_a_recorder_s_pool_is_never_without_a_recording(monkeypatch):
    fake, record = FakeGraph(monkeypatch), cuda_graphs.CudaRecorder(torch.device("cuda", 0))
    for _ in range(2):
        record(lambda: torch.zeros(1))
    assert fake.recorded == [1, 1, 1]  # the first one is empty, and held
    assert record._anchor is not None


def test_a_recording_that_fails_leaves_the_caller_s_stream(monkeypatch):
    fake, record = FakeGraph(monkeypatch), cuda_graphs.CudaRecorder(torch.device("cuda", 0))
    record(lambda: torch.zeros(1))
    fake.broken = True
    with pytest.raises(RuntimeError, match="previous error"):
        record(lambda: torch.zeros(1))
    assert fake.stream == "the caller's"
    fake.broken = False
    record(lambda: torch.zeros(1))
    assert fake.recorded == [1, 1, 1, 2, 2]  # another pool: the first one is in use for good


def test_the_generated_attention_kernels_can_be_recorded():
    cuda = [k for k in kernels(ops.tree_attention) if k.device == "cuda"]
    assert {k.name for k in cuda} == {"triton"} and all(k.capturable for k in cuda)
