"""Kernels for the ops of the tree IR. Importing this enters them into the registry; nothing is built before use."""

from __future__ import annotations

import torch

from treespec_compiler.ir import library, ops
from treespec_compiler.ir.registry import register_kernel

from . import aten, aten_chosen_attention, aten_convolution, aten_exponential_recurrence, aten_recurrence, cpu
from .gpu import (
    accept,
    commit,
    grouped_linear,
    recurrence,
    stochastic_accept,
    tree_attention,
    tree_attention_spec,
    triton_installed,
)

_FLOAT32 = frozenset({torch.float32})

register_kernel(ops.tree_attention, aten.TREE_ATTENTION, name="aten", optional=aten.OPTIONAL, priority=10)
register_kernel(ops.tree_chosen_attention, aten_chosen_attention.TREE_CHOSEN_ATTENTION, name="aten", priority=10)
register_kernel(ops.tree_convolution, aten_convolution.TREE_CONVOLUTION, name="aten", priority=10)
register_kernel(ops.tree_recurrence, aten_recurrence.TREE_RECURRENCE, name="aten", priority=10)
register_kernel(
    ops.tree_exponential_recurrence,
    aten_exponential_recurrence.TREE_EXPONENTIAL_RECURRENCE,
    name="aten",
    priority=10,
)
for _op, _target, _optional in (
    (ops.tree_attention, cpu.TREE_ATTENTION, cpu.OPTIONAL),
    (ops.packed_linear, cpu.PACKED_LINEAR, None),
    (ops.packed_embedding, cpu.PACKED_EMBEDDING, None),
    (ops.commit_path, cpu.COMMIT_PATH, None),
):
    register_kernel(
        _op,
        _target,
        name="native C++",
        device="cpu",
        dtypes=_FLOAT32,
        optional=_optional,
        priority=20,
        available=cpu.load,
    )
# Any further predicate over positions, and weights of each score alone, are ATen's: no kernel is printed for them.
_PRINTED = frozenset(library.optional(ops.tree_attention)) - {"pattern", "activation"}
_FLOATS = frozenset(tree_attention_spec.DTYPES)
for _op, _target, _dtypes, _optional, _capturable, _condition in (
    (ops.tree_attention, tree_attention.TREE_ATTENTION, _FLOATS, _PRINTED, True, tree_attention_spec.takes),
    (ops.tree_recurrence, recurrence.TREE_RECURRENCE, _FLOATS, None, False, recurrence.takes),
    (ops.commit_path, commit.COMMIT_PATH, None, None, False, None),
    (ops.greedy_accept, accept.GREEDY_ACCEPT, accept.DTYPES, None, False, None),
    (ops.stochastic_accept, stochastic_accept.STOCHASTIC_ACCEPT, frozenset({torch.float64}), None, False, None),
):
    register_kernel(
        _op,
        _target,
        name="triton",
        device="cuda",
        dtypes=_dtypes,
        optional=_optional,
        priority=30,
        available=triton_installed,
        capturable=_capturable,
        condition=_condition,
    )
# NOTE the reference is fit to run: a product a group on a CPU, and elsewhere nothing that waits for the device.
register_kernel(ops.grouped_linear, ops.grouped_linear, name="aten mm", priority=10, capturable=True)
register_kernel(
    ops.grouped_linear,
    grouped_linear.GROUPED_LINEAR,
    name="aten grouped mm",
    device="cuda",
    priority=20,
    capturable=True,
)
