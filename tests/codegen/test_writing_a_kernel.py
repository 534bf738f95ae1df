"""The page's code runs; kernels say what they take; entry points are found."""

from __future__ import annotations

import logging
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import fx
from tree_cases import CASES

import treespec_compiler as treespec
from treespec_compiler.errors import InvalidKernel
from treespec_compiler.ir import attention, library, ops, registry

PAGE = Path(__file__).resolve().parents[2] / "docs" / "writing-a-kernel.md"


@pytest.fixture(autouse=True)
def _entered(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Kernels of a test are forgotten after it."""
    monkeypatch.setattr(registry, "_KERNELS", {op: list(kernels) for op, kernels in registry._KERNELS.items()})
    yield
    registry._load_installed.cache_clear()


def test_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    module = ModuleType("page")  # Dynamo looks the model's module up
    monkeypatch.setitem(sys.modules, "page", module)
    for block in blocks:
        line = text[: text.index(block)].count("\n")
        exec(compile("\n" * line + block, str(PAGE), "exec"), vars(module))


def call(case: Any, **changes: Any) -> fx.Node:
    """A call of tree attention in a graph, with values as fake as they need be."""
    graph = fx.Graph()

    def node(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        made = graph.placeholder(f"x{len(graph.nodes)}")
        made.meta["val"] = value
        return made

    arguments = [node(a) for a in case.arguments()]
    made = graph.call_function(ops.tree_attention, tuple(arguments), {n: node(v) for n, v in changes.items()})
    made.meta["val"] = case.q
    return made


CHANGES: dict[str, Any] = {
    "window": 5,
    "chunk": 8,
    "softcap": 2.0,
    "slopes": torch.rand(4),
    "bias": torch.rand(4, 3),
    "sinks": torch.rand(4),
    "cos": torch.rand(8, 4),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_kernel_takes_the_optional_arguments_it_names(name: str) -> None:
    case = CASES["extend"]
    some = registry.register_kernel("tree_attention", attention.reference, name="some", optional=[name])
    none = registry.register_kernel("tree_attention", attention.reference, name="none", optional=[])
    node = call(case) if name == "window" else call(case, **{name: CHANGES[name]})
    if name == "window":
        node.args = (*node.args[:-1], CHANGES[name])
    assert some.takes(node) and not none.takes(node)
    assert none.takes(call(case))  # a window of 0 is none
    found = registry.best_kernel_for(node)
    assert found is some
    other = next(n for n in CHANGES if n not in (name, "window"))
    assert not some.takes(call(case, **{other: CHANGES[other]}))
    assert registry.best_kernel(ops.tree_attention, "cpu", torch.float32, given=[name]) is some


def test_a_kernel_takes_what_its_condition_says() -> None:
    def long_heads(call: registry.Arguments) -> bool:
        return call["q"].shape[3] > 100 and call["sinks"] is None

    kernel = registry.register_kernel("tree_attention", attention.reference, name="long", condition=long_heads)
    assert kernel.takes(call(CASES["gqa, head size 128"])) and not kernel.takes(call(CASES["extend"]))
    assert not kernel.takes(call(CASES["gqa, head size 128"], sinks=torch.rand(8)))


def test_a_kernel_is_for_a_device_and_for_dtypes() -> None:
    kernel = registry.register_kernel(
        "tree_attention", attention.reference, name="half", device="cpu", dtypes=[torch.float16]
    )
    assert kernel.runs("cpu", torch.float16) and not kernel.runs("cpu", torch.float32)
    assert not kernel.runs("cuda", torch.float16) and not kernel.takes(call(CASES["extend"]))
    assert registry.best_kernel(ops.tree_attention, "cpu", torch.float16) is kernel
    assert registry.best_kernel(ops.tree_attention, "cpu", torch.float16, portable=True) is not kernel


def test_of_a_name_there_is_one_kernel() -> None:
    def other(*args: Any, **kwargs: Any) -> torch.Tensor:
        return attention.reference(*args, **kwargs) * 0 + 1

    first = registry.register_kernel("tree_attention", attention.reference, name="mine")
    second = registry.register_kernel("tree_attention", other, name="mine")
    assert first not in registry.kernels(ops.tree_attention) and second in registry.kernels(ops.tree_attention)
    assert (second.target(*CASES["extend"].arguments()) == 1).all()
    assert library.definition(second.target) is ops.tree_attention is library.definition(ops.tree_attention)
    assert registry.kernel_of(second.target) is second and registry.kernel_of(first.target) is None
    registry.unregister_kernel(ops.tree_attention, "mine")
    assert second not in registry.kernels(ops.tree_attention)


def test_what_cannot_be_a_kernel() -> None:
    with pytest.raises(InvalidKernel, match=r"got the op attend, expected an op of the tree IR: .*tree_attention"):
        treespec.register_kernel("attend", attention.reference, name="mine")
    with pytest.raises(InvalidKernel, match="expected an op of the tree IR"):
        treespec.register_kernel(torch.ops.aten.add.Tensor, torch.add, name="mine")
    with pytest.raises(InvalidKernel, match=r"got the optional arguments mask, expected some of window, chunk"):
        treespec.register_kernel("tree_attention", attention.reference, name="mine", optional=["window", "mask"])
    with pytest.raises(InvalidKernel, match="expected some of none"):
        treespec.register_kernel("grouped_linear", torch.add, name="mine", optional=["bias"])


def test_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "packaged_kernel.py").write_text(
        "import treespec_compiler as treespec\n"
        "from treespec_compiler.ir import attention\n"
        "def enter():\n"
        "    treespec.register_kernel('tree_attention', attention.reference, name='packaged', priority=90)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    points = [
        EntryPoint("gone", "no_module", registry.GROUP),
        EntryPoint("packaged", "packaged_kernel:enter", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == registry.GROUP else [])
    registry._load_installed.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert registry.kernels(ops.tree_attention)[0].name == "packaged"
    assert "entry point gone (no_module) gives no kernel" in caplog.text  # a warning, not a broken treespec
