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
from treespec_compiler.codegen.gpu.recurrence import TREE_RECURRENCE
from treespec_compiler.codegen.gpu.tree_attention import TREE_ATTENTION
from treespec_compiler.ir import ops, registry
from treespec_compiler.ir.library import arguments, given

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    """The kernels for CUDA, entered for the CPU."""
    monkeypatch.setattr(registry, "_KERNELS", dict(registry._KERNELS))
    registry.register_kernel(ops.tree_attention, TREE_ATTENTION, name="interpreted", device="cpu", priority=99)
    registry.register_kernel(ops.tree_recurrence, TREE_RECURRENCE, name="interpreted", device="cpu", priority=99)


@pytest.mark.family
@pytest.mark.parametrize(
    ("model_type", "window", "changes"),
    [
        ("llama", None, {"cos", "sin", "rotary"}),
        ("gemma2", 4, {"softcap", "cos", "sin", "rotary"}),
        ("gpt_oss", 4, {"sinks", "cos", "sin", "rotary"}),
        ("bloom", None, {"slopes"}),
        ("deepseek_v2", None, set()),
    ],
)
def test_path_oracle(model_type, window, changes):
    model = tiny_model(model_type, window)
    # What `verify` would compare is compared here for every node, and each launch takes the interpreter seconds.
    program = tree_program(model, options=EAGER | {"verify": "off"})
    bound = [n for n in program.graph_module.graph.nodes if n.target is TREE_ATTENTION]
    assert len(bound) == len(program.sites)
    assert {name for n in bound for name in given(ops.tree_attention, arguments(n))} - {"window", "style"} == changes
    assert_decodes(model, program, VOCAB, rounds=2, size=7)


@pytest.mark.rare
@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba"])
def test_path_oracle_of_recurrences(model_type):
    model = tiny_model(model_type, num_hidden_layers=2)
    program = tree_program(model, options=EAGER | {"verify": "off"})
    bound = [n for n in program.graph_module.graph.nodes if n.target is TREE_RECURRENCE]
    assert len(bound) == sum(spec.kind == "recurrence" for spec in program.states) > 0
    assert_decodes(model, program, VOCAB, rounds=1, size=5)
