"""What spreads a model over devices, or compiles it or a part of it, is looked through where it changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from breaks import Break
from modules import VOCAB
from oracles import EAGER, assert_decodes
from styles import built
from torch import nn

import treespec_compiler as treespec
from treespec_compiler.errors import Refusal


def aligned(model: nn.Module) -> nn.Module:
    hooks = pytest.importorskip("accelerate.hooks")
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True), append=True)
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(torch.device("cpu")), append=True)
    return model


def dispatched(model: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    found: nn.Module = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    return found


def in_parts(model: nn.Module) -> nn.Module:
    assert isinstance(model, Break)
    model.qkv[0] = torch.compile(model.qkv[0])
    model.norms[0].compile()
    model.head.forward = torch.compile(model.head.forward)
    return model


@pytest.mark.parametrize("wrap", [aligned, dispatched, in_parts, nn.DataParallel])
def test_rows_are_the_models_own(wrap: Callable[[nn.Module], nn.Module]) -> None:
    alone = built(Break)
    wrapped = wrap(copy.deepcopy(alone))
    program = treespec.tree_program(wrapped, options=EAGER)
    graph = program.graph_module
    assert_decodes(alone, program, VOCAB, rounds=1, size=7)
    assert treespec.tree_program(wrapped, options=EAGER).graph_module is graph


def test_one_rank_of_ddp(tmp_path: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        alone = built(Break)
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(alone))
        assert_decodes(alone, treespec.tree_program(wrapped, options=EAGER), VOCAB, rounds=1, size=7)
    finally:
        dist.destroy_process_group()


@pytest.mark.rare
def test_hooks_that_fetch_weights_are_refused_until_they_are_off() -> None:
    accelerate, hooks = pytest.importorskip("accelerate"), pytest.importorskip("accelerate.hooks")
    alone = built(Break)
    model = accelerate.cpu_offload(copy.deepcopy(alone), torch.device("cpu"))
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(model, options=EAGER)
    assert refusal.value.kind is Refusal.NO_GRAPH
    assert "remove_hook_from_module(model, recurse=True)" in (refusal.value.way_out or "")
    hooks.remove_hook_from_module(model, recurse=True)
    assert_decodes(alone, treespec.tree_program(model, options=EAGER), VOCAB, rounds=1, size=7)


def test_a_hook_that_does_more_is_no_such_hook() -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubles(hooks.ModelHook):  # type: ignore[misc, name-defined]
        def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
            return output * 2

    model = built(Break)
    hooks.add_hook_to_module(model, Doubles())
    assert_decodes(model, treespec.tree_program(model, options=EAGER), VOCAB, rounds=1, size=7)
