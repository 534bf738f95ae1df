"""The one-trace export gives what aot_export_module gives, node for node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import native_cache
import pytest
import torch
from modules import NanoGPT, RopeTril
from native_cache import CachedDecoder
from oracles import EAGER
from torch import fx, nn

import treespec_compiler as treespec
from treespec_compiler import Unsupported
from treespec_compiler.capture import capture
from treespec_compiler.capture.call import call_spec
from treespec_compiler.capture.functional import functional_graph


def by_aot(gm: fx.GraphModule, inputs: Any, fakes: Any, mode: Any) -> tuple[fx.GraphModule, list[str]]:
    from torch._functorch.aot_autograd import aot_export_module

    graph, signature = aot_export_module(gm, fakes, trace_joint=False, pre_dispatch=True, decompositions={})
    return graph, list({**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}.values())


def rows(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Everything passes read of a node, sizes aside: where a size is computed has no meaning."""
    kept = [n for n in graph.nodes if n.op != "call_function" or "aten" in str(n.target) or "getitem" in str(n.target)]
    names = {n: f"v{i}" for i, n in enumerate(kept)}
    found = []
    for n in kept:
        args = fx.node.map_arg((n.args, n.kwargs), lambda a: names.get(a, str(a.target)))
        value = n.meta.get("val")
        where = [path for path, _ in (n.meta.get("nn_module_stack") or {}).values()]
        shape = (value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else None
        target = "" if n.op == "placeholder" else str(n.target)
        found.append((n.op, target, str(args), n.meta.get("stack_trace"), where, str(shape)))
    return found


def llama() -> nn.Module:
    pytest.importorskip("transformers")
    import zoo

    return zoo.make("llama")


CALLS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "nano": (NanoGPT, ()),
    "rope": (RopeTril, ()),
    "llama": (llama, ()),
    "own cache": (CachedDecoder, ((torch.arange(9)[None], torch.arange(9)), {"input_pos": "positions"})),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.family
def test_as_aot_export_module(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, arguments = CALLS[name]
    model = make().eval()
    call = call_spec(model, *arguments)
    mine = capture.capture(model, call)
    monkeypatch.setattr(capture, "functional_graph", by_aot)
    theirs = capture.capture(model, call)
    assert rows(mine.graph.graph) == rows(theirs.graph.graph)
    assert mine.written == theirs.written and len(mine.written) == (4 if name == "own cache" else 0)
    assert list(map(str, mine.guards)) == list(map(str, theirs.guards))


class OneMemory(native_cache.Cache):
    """Keys are a view of the values' memory: what is written to one is read through the other."""

    def __init__(self) -> None:
        super().__init__()
        self.k_cache = self.v_cache.view(self.v_cache.shape)


def test_buffers_that_share_memory_are_refused() -> None:
    attention = type("Own", (native_cache.Attention,), {"cache": OneMemory})
    model = type("Decoder", (CachedDecoder,), {"attention": attention})(layers=1)
    with pytest.raises(Unsupported, match="changes state in place"):
        treespec.tree_program(model, (torch.arange(9)[None], torch.arange(9)), {"input_pos": "positions"}, EAGER)


def test_garbage_is_collected_again() -> None:
    import gc

    assert gc.isenabled()
    with pytest.raises(Unsupported):
        capture.capture(nn.Linear(2, 2), call_spec(nn.Linear(2, 2)))
    assert gc.isenabled() and functional_graph is capture.functional_graph
