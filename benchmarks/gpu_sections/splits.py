"""Attention's time over the number of programs that share the committed tokens, and what `split_count` would choose.

Its constants (codegen/gpu/tree_attention_spec.py) are fitted to this. Not part of a plain run.
"""

from __future__ import annotations

import functools

import torch

from treespec_compiler.codegen.gpu.tree_attention_spec import MAX_SPLITS, AttentionKernel, default_config, split_count
from treespec_compiler.codegen.gpu.trial import Workload
from treespec_compiler.codegen.gpu.tune_device import Inputs

from .base import Context, milliseconds
from .numerics import eager_attention

SPEC = AttentionKernel(32, 8, 128, 128, torch.bfloat16, torch.bfloat16)
SIZES = tuple((nodes, context) for context in (2048, 8192, 32768, 131072) for nodes in (1, 8, 16, 64))
COUNTS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, MAX_SPLITS)


def run(context: Context) -> None:
    spec = context.pick(SPEC, AttentionKernel(4, 2, 16, 16, torch.float32, torch.float32))
    for nodes, length in context.pick(SIZES, ((3, 20),)):
        what = f"{nodes} nodes behind {length} tokens"
        if context.left() < 6:
            context.skipped(what, "no time left")
            continue
        context.attempt(what, functools.partial(sweep, context, spec, nodes, length))


def sweep(context: Context, spec: AttentionKernel, nodes: int, length: int) -> None:
    """One request's tree, by the default configuration."""
    inputs = Inputs(spec, Workload(nodes, 1, length), context.device)
    config = default_config(spec, nodes * spec.group)
    programs = -(-nodes * spec.group // config.block_m) * spec.kv_heads
    processors = torch.cuda.get_device_properties(context.device).multi_processor_count if context.on_gpu else 1
    chosen = split_count(spec, programs, inputs.shape.capacity, config, processors)
    us = {}
    for count in sorted({chosen, *context.pick(COUNTS, (1, 2))}):
        call = functools.partial(inputs.attend, config, count) if context.on_gpu else lambda: eager_attention(inputs)
        us[str(count)] = 1e3 * milliseconds(context, {"attention": call}, 0.02)["attention"]
    context.row("sweeps", nodes=nodes, context=length, config=config.as_dict(), chosen=chosen, us=us)
