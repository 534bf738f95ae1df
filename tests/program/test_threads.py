"""Models that are used for the first time in several threads at once: each is right, and compiled apart."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import modules
import pytest
import torch
import torch._inductor.compile_fx as compile_fx
from oracles import EAGER, assert_decodes
from torch import nn

import treespec_compiler as treespec
from treespec_compiler.program.lowering import _compiled_graph

pytestmark = pytest.mark.converts

TOGETHER = 8


def _model(seed: int) -> nn.Module:
    """Same shapes in all, other weights; every other one computes something else."""
    torch.manual_seed(seed)
    model = modules.NanoGPT().eval()
    if seed % 2:
        model.head.register_forward_hook(lambda _m, _a, out: out.tanh() * 3)
    return model


def _decodes(model: nn.Module, options: Any) -> None:
    assert_decodes(model, treespec.tree_program(model, options=options), modules.VOCAB, rounds=2, size=7)


@pytest.mark.parametrize("attempt", range(1))
@pytest.mark.rare
def test_first_use_in_many_threads(attempt: int) -> None:
    models = [_model(10 * attempt + i) for i in range(TOGETHER)]
    start = threading.Barrier(TOGETHER)

    def use(model: nn.Module) -> None:
        start.wait()
        _decodes(model, EAGER)

    with ThreadPoolExecutor(TOGETHER) as pool:
        list(pool.map(use, models))


def test_two_threads_make_one_program_of_a_model() -> None:
    model, start = _model(1), threading.Barrier(4)

    def make(_: int) -> Any:
        start.wait()
        return treespec.tree_program(model, options=EAGER)

    with ThreadPoolExecutor(4) as pool:
        assert len(set(map(id, pool.map(make, range(4))))) == 1


@pytest.mark.rare
def test_lowerings_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second thread tries to lower while the first one is inside Inductor: it waits, and gets its own code."""
    real, first_is_in, inside, most = compile_fx.compile_fx, threading.Event(), [0], [0]

    def watched(*args: Any, **kwargs: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        first_is_in.set()
        try:
            compiled = real(*args, **kwargs)
        finally:
            inside[0] -= 1
        found.append(_compiled_graph(compiled))
        return compiled

    found: list[Any] = []
    monkeypatch.setattr(compile_fx, "compile_fx", watched)
    models = [_model(i) for i in range(2)]
    options = {"lowering": "inductor"}
    programs = [treespec.tree_program(m, options=options) for m in models]

    def second() -> None:
        first_is_in.wait(60)
        _decodes(models[1], options)

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(_decodes, models[0], options), pool.submit(second)]
        for job in jobs:
            job.result()
    assert most == [1] and len(found) == 2 and None not in found and found[0] is not found[1]
    assert [p.compile_count for p in programs] == [1, 1]
