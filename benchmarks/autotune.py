"""Measures configurations of tree attention for usual models on the GPU at hand.

    python benchmarks/autotune.py                    # into the user's cache, over the shipped tables
    python benchmarks/autotune.py --ship             # into codegen/tables, to be committed
    python benchmarks/autotune.py --limit 0          # every configuration that fits a shape
    python benchmarks/autotune.py --kernels 32/8/128 --shapes 1x1x2048 64x1x2048

A kernel is named HEADS/KV_HEADS/DIM, with VALUE_DIM behind a plus and a window behind a w: 32/8/128, 16/16/192+128,
32/8/128w4096. Stop it whenever you like: it goes on where it was. Shapes that nothing is right for are left out.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace

import torch

from treespec_compiler.cli.main import describe
from treespec_compiler.cli.models import DTYPES
from treespec_compiler.cli.tune_kernels import add_limit, gpu, tune_kernels
from treespec_compiler.codegen import tables
from treespec_compiler.codegen.gpu.tree_attention_spec import AttentionKernel
from treespec_compiler.codegen.gpu.trial import Workload
from treespec_compiler.codegen.gpu.tune import OP, SHAPES
from treespec_compiler.errors import InvalidOption, TreespecError
from treespec_compiler.ir.specs import MaskSpec

# Llama 3 8B and 1B, Qwen 3 0.6B, a 7B without shared heads, Mistral's window, Gemma 2's dimension.
KERNELS = ("32/8/128", "32/8/64", "16/8/128", "32/32/128", "32/8/128w4096", "8/4/256")


def kernel(text: str) -> AttentionKernel:
    """In bfloat16."""
    number = "([1-9][0-9]*)"
    match = re.fullmatch(rf"{number}/{number}/{number}(?:\+{number})?(?:w{number})?", text)
    if not match or int(match[1]) % int(match[2]):
        expected = "HEADS/KV_HEADS/DIM such as 32/8/128, HEADS a multiple of KV_HEADS"
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
    heads, kv_heads, key_dim, value_dim, window = (int(x or 0) for x in match.groups())
    dtype = torch.bfloat16
    return AttentionKernel(heads, kv_heads, key_dim, value_dim or key_dim, dtype, dtype, MaskSpec(window))


def shape(text: str) -> Workload:
    try:
        return Workload.parse(text)
    except InvalidOption as error:  # argparse shows no other error's text
        raise argparse.ArgumentTypeError(f"got {error.got!r}, expected {error.expected}") from None


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--kernels", nargs="+", type=kernel, default=[*map(kernel, KERNELS)], metavar="KERNEL")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES, metavar="NODESxREQUESTSxCONTEXT")
    add_limit(parser)
    parser.add_argument("--again", action="store_true", help="measure shapes the table has already")
    parser.add_argument("--ship", action="store_true", help="write codegen/tables instead of the user's cache")
    arguments = parser.parse_args()
    dtype = DTYPES[arguments.dtype]
    specs = [replace(spec, dtype=dtype, pool_dtype=dtype) for spec in arguments.kernels]
    try:
        device = gpu()
        place = tables.shipped_path if arguments.ship else tables.user_path
        path = place(OP, tables.architecture(device))
        tune_kernels(specs, arguments.shapes, device, path, limit=arguments.limit or None, again=arguments.again)
    except TreespecError as error:
        raise SystemExit(f"autotune: {describe(error)}") from None


if __name__ == "__main__":
    main()
