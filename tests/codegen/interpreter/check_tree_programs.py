"""Whole decoders on the generated kernels, in Triton's interpreter, against the eager model for every node."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from oracles import EAGER, assert_decodes

import treespec_compiler.codegen  # noqa: F401  enters the kernels
from treespec_compiler import tree_program
from treespec_compiler.cli.coverage.models import VOCAB, tiny_model
from treespec_compiler.codegen.gpu.tree_attention import SCORED_TREE_ATTENTION, TREE_ATTENTION
from treespec_compiler.ir import ops, registry

KERNELS = {ops.tree_attention: TREE_ATTENTION, ops.scored_tree_attention: SCORED_TREE_ATTENTION}

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    """The kernels for CUDA, entered for the CPU."""
    monkeypatch.setattr(registry, "_KERNELS", dict(registry._KERNELS))
    for op, target in KERNELS.items():
        registry.register_kernel(op, device="cpu", dtypes=None, priority=99, name="interpreted", target=target)


@pytest.mark.parametrize(
    ("model_type", "window", "scored"),
    [
        ("llama", None, False),
        ("gemma2", 4, True),
        ("gpt_oss", 4, True),
        ("bloom", None, True),
        ("deepseek_v2", None, False),
    ],
)
def test_path_oracle(model_type, window, scored):
    model = tiny_model(model_type, window)
    program = tree_program(model, options=EAGER)
    bound = {n.target for n in program.graph_module.graph.nodes if n.target in KERNELS.values()}
    assert (SCORED_TREE_ATTENTION in bound) == scored and bound
    assert_decodes(model, program, VOCAB, rounds=2, size=7)
