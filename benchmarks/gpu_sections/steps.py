"""A whole model's step: verify(N) over decode(1), and the step over what reading the weights takes."""

from __future__ import annotations

import functools
import os
import time
from typing import Any

import torch

import treespec_compiler as treespec
from treespec_compiler.program.lowering import compile_calls

from . import llama
from .base import Context, copy_rate, milliseconds, wall_milliseconds

CASES = ((1, 2048), (8, 2048), (1, 16384), (8, 16384))  # batch, context
NODES = (1, 2, 4, 8, 16, 32, 64)


def run(context: Context, size: str) -> None:
    """Compiles (cold where the caches are empty), then measures."""
    name, dtype = context.pick((size, torch.bfloat16), ("tiny", torch.float32))
    model = llama.make(name, context.device, dtype)
    context.keep("shape", vars(model.shape))
    context.keep("weight_bytes", llama.weight_bytes(model))
    program = compile_program(context, model)
    rate = copy_rate(context)
    context.keep("copy_bytes_per_second", rate)
    floor = 1e3 * llama.weight_bytes(model) / rate
    context.keep("floor_ms", floor)
    compiled = compile_calls()
    for batch, length in context.pick(CASES, ((2, 16), (1, 16))):
        if context.left() < 8:
            context.skipped(f"batch {batch}, context {length}", "no time left")
            continue
        what = f"batch {batch}, context {length}"
        context.attempt(what, functools.partial(measure, context, program, batch, length, floor))
        context.keep("recompiles", compile_calls() - compiled)
        context.keep("graphs", vars(program.graph_stats))


def compile_program(context: Context, model: llama.Llama) -> Any:
    began = time.perf_counter()
    lowering = context.pick("inductor", "eager")
    program = treespec.tree_program(model, options={"lowering": lowering})
    converted = time.perf_counter() - began
    cache = program.new_cache(max_tokens=64)
    program.verify(treespec.TokenTree([1], [-1]), cache)
    context.synchronize()
    seconds = {"capture": program._made.converted.capture_seconds, "convert": converted}
    seconds |= {"first_call": time.perf_counter() - began - converted, "all": time.perf_counter() - began}
    context.keep("compile_seconds", seconds | {"caches": os.environ.get("TREESPEC_SUITE_CACHES", "as they were")})
    return program


def measure(context: Context, program: Any, batch: int, length: int, floor: float) -> None:
    nodes = context.pick(NODES, (1, 4))
    if context.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(context.device)
    began = time.perf_counter()
    cache = program.new_cache(max_tokens=length + max(nodes), slots=batch)
    # NOTE the speed does not depend on what the K/V are, so nothing is prefilled; zeros would be faster to multiply.
    for storage in cache.storages:
        storage.normal_()
    cache._lengths = [length] * batch
    calls = {}
    for count in nodes:
        tree = treespec.TokenTree([1 + i % 90 for i in range(count)], [(i + 1) // 2 - 1 for i in range(count)])
        forest = treespec.Forest([(slot, tree) for slot in range(batch)])
        calls[str(count)] = lambda forest=forest: program.verify(forest, cache)
    with torch.inference_mode():
        wall = wall_milliseconds(context, calls, budget=1.5)
        device = on_device(context, program, calls)
    peak = torch.cuda.max_memory_allocated(context.device) if context.on_gpu else 0
    context.row(
        "cases", batch=batch, context=length, kv_bytes=cache.bytes, peak_bytes=peak, step_ms=wall, device_ms=device,
        seconds=time.perf_counter() - began,
        verify_over_decode={n: t / wall["1"] for n, t in wall.items()},
        over_floor={n: t / floor for n, t in wall.items()},
    )  # fmt: skip


def on_device(context: Context, program: Any, calls: dict[str, Any]) -> dict[str, float]:
    """The recorded step alone, without the host's part; empty where nothing was recorded."""
    if program._executor._graphs is None:
        return {}
    found = {}
    for name, call in calls.items():
        replays = program.graph_stats.replays
        call()
        entry = next(reversed(program._executor._graphs._entries.values()), None)
        if program.graph_stats.replays > replays and entry is not None:
            # Cold: reading that buffer also hides the launch of the replay.
            found[name] = milliseconds(context, {name: entry.replay}, 0.2, graph=False)[name]
    return found
