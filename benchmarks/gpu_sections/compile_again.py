"""Compiles a model once more, with the caches that its section left: what a second process of a user waits for."""

from __future__ import annotations

import torch

from . import llama
from .base import Context
from .steps import compile_program


def run(context: Context, size: str) -> None:
    name, dtype = context.pick((size, torch.bfloat16), ("tiny", torch.float32))
    compile_program(context, llama.make(name, context.device, dtype))
