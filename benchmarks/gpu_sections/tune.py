"""A short tuning of the 8B shape's attention: later sections launch what it finds."""

from __future__ import annotations

import shutil
import time

import torch

from treespec_compiler.codegen import tables
from treespec_compiler.codegen.gpu import triton_installed
from treespec_compiler.codegen.gpu.tree_attention_spec import AttentionKernel, default_config
from treespec_compiler.codegen.gpu.trial import Workload
from treespec_compiler.codegen.gpu.tune import OP, Tuner, tune
from treespec_compiler.errors import TreespecError

from .base import Context, milliseconds, reason
from .numerics import eager_attention

SPEC = AttentionKernel(32, 8, 128, 128, torch.bfloat16, torch.bfloat16)
SHAPES = tuple(Workload(n, 1, c) for n in (64, 1) for c in (2048, 32768))
LIMIT = 3


def run(context: Context) -> None:
    from treespec_compiler.codegen.gpu.tune_device import DeviceBench, Inputs, empty_table

    if not context.on_gpu:
        smoke(context, Inputs)
        return
    arch = tables.architecture(context.device)
    path = tables.user_path(OP, arch)
    bench = DeviceBench(SPEC, context.device)
    tuner = Tuner(SPEC, arch, bench.check, bench.measure, limit=LIMIT)
    table = tables.resumed(path, empty_table(arch, context.device))
    for shape in SHAPES:
        if context.left() < 15:
            context.skipped(f"shape {shape}", "no time left")
            continue
        began = time.perf_counter()
        default = bench.measure(default_config(SPEC, shape.nodes * SPEC.group, arch), shape)
        try:
            entry = tuner.entry(shape)
        except TreespecError as error:  # no configuration is right
            context.skipped(f"shape {shape}", reason(error))
            continue
        table = tables.merge(table, [entry])
        tables.write(path, table)
        context.row(
            "shapes", shape=str(shape), us=entry.us, default_us=default, config=dict(entry.config),
            runner_up=entry.runner_up, seconds=time.perf_counter() - began,
        )  # fmt: skip
    context.keep("left_out", {str(c): why for c, why in tuner.rejected.items()})
    if path.is_file():
        shutil.copy(path, context.path.with_name(f"{OP}-{arch}.json"))


def smoke(context: Context, inputs_of: type) -> None:
    """The same loop on a table of its own, with times of the reference."""
    if not triton_installed():
        context.skipped("compilation", "triton is not installed")
        return
    spec, shape = AttentionKernel(4, 2, 16, 16, torch.float32, torch.float32), Workload(2, 1, 16)
    inputs = inputs_of(spec, shape, context.device)

    def measure(config: object, shape: object) -> float:
        return 1e3 * milliseconds(context, {"reference": lambda: eager_attention(inputs)}, 0.01)["reference"]

    tuner = Tuner(spec, "sm_90", check=lambda config, shape: 0.0, measure=measure, limit=1)
    table = tables.TuningTable(OP, "sm_90", tables.kernel_hash(OP), ())
    table = tune(tuner, [shape], table, lambda t: tables.write(context.path.with_name("table.json"), t))
    context.row("shapes", shape=str(shape), us=table.entries[0].us, config=dict(table.entries[0].config))
