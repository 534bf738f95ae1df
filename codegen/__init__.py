"""Kernels for the ops of the tree IR. Importing this enters them into the registry; nothing is built before use."""

from __future__ import annotations

import torch

from treespec_compiler.ir import ops
from treespec_compiler.ir.registry import register_kernel

from . import aten, aten_scored, cpu
from .gpu import (
    accept,
    commit,
    grouped_linear,
    rope_attention,
    stochastic_accept,
    tree_attention,
    tree_attention_spec,
    triton_installed,
)

_FLOAT32 = frozenset({torch.float32})

register_kernel(
    ops.tree_attention, device="any", dtypes=None, priority=10, name="aten sdpa", target=aten.TREE_ATTENTION
)
register_kernel(
    ops.scored_tree_attention,
    device="any",
    dtypes=None,
    priority=10,
    name="aten dense",
    target=aten_scored.SCORED_TREE_ATTENTION,
)
for _op, _target in (
    (ops.tree_attention, cpu.TREE_ATTENTION),
    (ops.packed_linear, cpu.PACKED_LINEAR),
    (ops.commit_path, cpu.COMMIT_PATH),
):
    register_kernel(
        _op, device="cpu", dtypes=_FLOAT32, priority=20, name="native C++", target=_target, available=cpu.load
    )
for _op, _target, _dtypes in (
    (ops.commit_path, commit.COMMIT_PATH, None),
    (ops.greedy_accept, accept.GREEDY_ACCEPT, accept.DTYPES),
    (ops.stochastic_accept, stochastic_accept.STOCHASTIC_ACCEPT, frozenset({torch.float64})),
):
    register_kernel(
        _op, device="cuda", dtypes=_dtypes, priority=30, name="triton", target=_target, available=triton_installed
    )
for _op, _target in (
    (ops.tree_attention, tree_attention.TREE_ATTENTION),
    (ops.scored_tree_attention, tree_attention.SCORED_TREE_ATTENTION),
    (ops.rope_tree_attention, rope_attention.ROPE_TREE_ATTENTION),
    (ops.rope_scored_tree_attention, rope_attention.ROPE_SCORED_TREE_ATTENTION),
):
    register_kernel(
        _op,
        device="cuda",
        dtypes=frozenset(tree_attention_spec.DTYPES),
        priority=30,
        name="triton",
        target=_target,
        available=triton_installed,
        capturable=True,
    )
# NOTE the reference is fit to run: a product a group on a CPU, and elsewhere nothing that waits for the device.
for _device, _priority, _name, _target in (
    ("any", 10, "aten mm", ops.grouped_linear),
    ("cuda", 20, "aten grouped mm", grouped_linear.GROUPED_LINEAR),
):
    register_kernel(
        ops.grouped_linear,
        device=_device,
        dtypes=None,
        priority=_priority,
        name=_name,
        target=_target,
        capturable=True,
    )
