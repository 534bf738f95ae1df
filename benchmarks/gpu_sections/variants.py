"""What could be the default: linears joined or apart, and who attends over a prompt. Not part of a plain run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import treespec_compiler as treespec
from treespec_compiler.codegen.gpu import prompt

from . import llama
from .base import Context, wall_milliseconds

PIPELINES = {"linears apart": None, "linears joined": "default,join-linears"}
CONTEXT = 2048
PROMPTS = (2048, 8192)


def run(context: Context, size: str) -> None:
    name, dtype = context.pick((size, torch.bfloat16), ("tiny", torch.float32))
    model = llama.make(name, context.device, dtype)
    lowering = context.pick("inductor", "eager")
    programs = {
        label: treespec.tree_program(model, options={"lowering": lowering, "pipeline": pipeline})
        for label, pipeline in PIPELINES.items()
    }
    context.keep("joined_bytes", programs["linears joined"].packed_bytes)
    with torch.inference_mode():
        context.attempt("steps", lambda: steps(context, programs))
        for length in context.pick(PROMPTS, (12,)):
            prompt_of = functools.partial(prompts, context, programs["linears apart"], length)
            context.attempt(f"prompt {length}", prompt_of)


def steps(context: Context, programs: dict[str, Any]) -> None:
    """Milliseconds of trees of some sizes behind the same number of tokens, all programs in turns."""
    length, sizes = context.pick((CONTEXT, (1, 64)), (16, (1, 4)))
    calls: dict[str, Callable[[], object]] = {}
    for label, program in programs.items():
        cache = program.new_cache(max_tokens=length + max(sizes))
        for storage in cache.storages:
            storage.normal_()
        cache._lengths = [length]
        for count in sizes:
            tree = treespec.TokenTree([1 + i % 90 for i in range(count)], [(i + 1) // 2 - 1 for i in range(count)])
            calls[f"{label}, {count}"] = lambda program=program, tree=tree, cache=cache: program.verify(tree, cache)
    context.row("steps", context=length, step_ms=wall_milliseconds(context, calls, budget=4.0))


def prompts(context: Context, program: Any, length: int) -> None:
    """Milliseconds of a whole prompt into an empty slot, by PyTorch's flash attention and by the generated kernel."""
    cache, ids = program.new_cache(max_tokens=length), [1 + i % 90 for i in range(length)]

    def prefill() -> object:
        cache.free(0)
        return program.prefill(ids, cache)

    def generated() -> object:
        with mock.patch.object(prompt, "flash_takes", lambda *_: False):
            return prefill()

    found = wall_milliseconds(context, {"flash": prefill, "generated": generated}, budget=4.0)
    context.row("prompts", tokens=length, prefill_ms=found)
