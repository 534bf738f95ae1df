"""A kernel that Triton compiled wrongly is refused before it computes anything."""

from __future__ import annotations

import types

import pytest
import torch

from treespec_compiler.codegen.gpu import attention_launches, self_check, tree_attention
from treespec_compiler.codegen.gpu.source import load
from treespec_compiler.codegen.gpu.tree_attention_source import source
from treespec_compiler.codegen.gpu.tree_attention_spec import AttentionKernel, Config
from treespec_compiler.codegen.gpu.trial import Workload
from treespec_compiler.codegen.gpu.tune_device import Inputs
from treespec_compiler.errors import WrongKernel
from treespec_compiler.ir.specs import MaskSpec

CPU = torch.device("cpu")
CONFIG = Config(16, 32, 4, 2)
PLAIN = AttentionKernel(4, 2, 16, 16, torch.float32, torch.float32)
CHANGED = AttentionKernel(
    4, 2, 24, 16, torch.float32, torch.float32, MaskSpec(50), softcap=5.0, slopes=True, bias=True, sinks=True
)


@pytest.fixture(autouse=True)
def _nothing_is_confirmed():
    self_check.confirm.cache_clear()
    yield
    self_check.confirm.cache_clear()


@pytest.mark.family
@pytest.mark.parametrize(
    "spec, split, several, chain",
    [(PLAIN, False, False, False), (PLAIN, True, False, True), (CHANGED, True, True, False)],
)
def test_right_kernels_are_confirmed(spec, split, several, chain):
    self_check.confirm(tree_attention.attend, spec, CONFIG, split, several, chain, CPU)


@pytest.mark.family
@pytest.mark.parametrize(
    "right, wrong",
    [
        ("acc0 * rescale[:, None]", "acc0"),
        ("seen = inside[None, :]", "seen = inside[None, :] & (n[None, :] != 165)"),  # one key behind whole blocks
        ("(word >> bit[None, :]) & 1", "(word >> bit[None, :]) & 2"),
    ],
)
def test_wrong_kernels_are_refused(monkeypatch, right, wrong):
    text = source(PLAIN)
    assert right in text
    module = load("tree_attention", PLAIN.key(), text.replace(right, wrong))
    monkeypatch.setattr(attention_launches, "module", lambda spec: module)
    with pytest.raises(WrongKernel) as caught:
        self_check.confirm(tree_attention.attend, PLAIN, CONFIG, True, False, False, CPU)
    for part in ("4 heads over 2 of 16 numbers", "block_m=16", "expected at most 1.0e-05", "triton", 'kernels="aten"'):
        assert part in str(caught.value)


def test_nothing_is_confirmed_while_a_graph_is_recorded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="never been launched"):
        self_check.confirm(tree_attention.attend, PLAIN, CONFIG, True, False, False, torch.device("cuda"))


def test_what_a_launch_chose_itself_is_confirmed(monkeypatch):
    asked = []
    monkeypatch.setattr(tree_attention, "profile", lambda device: types.SimpleNamespace(number=lambda device: 0))
    monkeypatch.setattr(tree_attention, "_config", lambda *_: CONFIG)
    monkeypatch.setattr(tree_attention, "_processors", lambda device: 132)
    monkeypatch.setattr(tree_attention, "self_check", types.SimpleNamespace(confirm=lambda *given: asked.append(given)))
    for requests, context, chain in ((1, 5, False), (2, 5, False), (1, 4096, False), (1, 5, True)):
        Inputs(PLAIN, Workload(2, requests, context), CPU, chain=chain).attend()
    flags = [(split, several, chain) for _, _, _, split, several, chain, _ in asked]
    assert flags == [(False, False, False), (False, True, False), (True, False, False), (False, False, True)]
    Inputs(PLAIN, Workload(2, 1, 5), CPU).attend(CONFIG, 1)
    assert len(asked) == 4  # the caller's own choice is the caller's
