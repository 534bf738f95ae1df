"""Measure this machine: the kernels of a GPU, or how long a model's forward passes take (for `policy="auto"`)."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import InvalidOption
from ..program import tree_program
from ..speculation.cost import LatencyTable, fingerprint, latency, table_path
from .generate import parse_options
from .models import DTYPES, load
from .tune_kernels import add_limit, tune_model

EPILOG = """\
examples:
  treespec tune demo --device cuda
  treespec tune hf:PATH --device cuda --dtype bfloat16 --shapes 1x1x2048 64x1x2048 --out sm_90.json
  treespec tune --latency --target demo --draft demo

Kernels: configurations are compiled for the GPU at hand; those that spill or do not fit are left out, the rest is
checked against float64 and timed. A run that was stopped goes on where it was.
"""


def configure(parser: ArgumentParser) -> None:
    parser.epilog = EPILOG
    kernels = parser.add_argument_group("kernels")
    kernels.add_argument("model", metavar="MODEL", nargs="?", help="hf:PATH_OR_ID, py:module:factory or demo")
    kernels.add_argument("--device", choices=("cuda",), help="tune MODEL's kernels on this device")
    kernels.add_argument("--shapes", metavar="SHAPE", nargs="+", help="NODESxREQUESTSxCONTEXT, such as 64x1x2048")
    kernels.add_argument("--out", metavar="FILE", type=Path, help="the table (default: in the user's cache)")
    add_limit(kernels)
    kernels.add_argument("--again", action="store_true", help="measure shapes the table has already")
    passes = parser.add_argument_group("forward passes")
    passes.add_argument(
        "--latency", action="store_true", help="measure passes of 1 to 64 nodes behind several contexts"
    )
    passes.add_argument("--target", metavar="MODEL", help="hf:PATH_OR_ID, py:module:factory or demo")
    passes.add_argument("--draft", metavar="MODEL", help="measure this one as well")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the models (default: float32)")
    parser.add_argument("--random-weights", action="store_true", help="read configurations only (hf: models)")
    parser.add_argument("--tiny", action="store_true", help="shrink the configuration (hf: models)")
    parser.add_argument("--option", metavar="NAME=VALUE", action="append", default=[], help="an option of the compiler")


def run(arguments: Namespace) -> int:
    if arguments.latency:
        if arguments.target is None:
            raise InvalidOption(name="--target", got=None, expected="a model", fix="Name one: --target demo.")
        return measure_passes(arguments)
    if arguments.model is None or arguments.device is None:
        expected = "MODEL --device cuda (its kernels), or --latency --target MODEL (its forward passes)"
        raise InvalidOption(name="tune", got="nothing to tune", expected=expected, fix="Say which.")
    return tune_model(arguments)


def measure_passes(arguments: Namespace) -> int:
    console = Console(highlight=False)
    options = parse_options(arguments.option)
    for role, name in (("target", arguments.target), ("draft", arguments.draft)):
        if name is None:
            continue
        kind: Any = role
        model = load(
            name,
            role=kind,
            dtype=DTYPES[arguments.dtype],
            random_weights=arguments.random_weights,
            tiny=arguments.tiny,
        )
        program = tree_program(model.model, options=options)
        with console.status(f"measuring the {role}"):
            table = latency(program, thorough=True)
        show(console, f"{role} {name}", table)
        console.print(f"written to {table_path(str(fingerprint(program)))}", markup=False, soft_wrap=True)
    return 0


def show(console: Console, title: str, table: LatencyTable) -> None:
    """Milliseconds by nodes and context, of one request."""
    alone = [p for p in table.points if p.batch == 1]
    contexts, nodes = sorted({p.context for p in alone}), sorted({p.nodes for p in alone})
    seconds = {(p.nodes, p.context): p.seconds for p in alone}
    shown = Table(box=box.SIMPLE_HEAD, title=f"{title}: milliseconds of a pass", pad_edge=False)
    for heading in ("nodes", *(f"{c} tokens" for c in contexts)):
        shown.add_column(heading, justify="right", no_wrap=True)
    for n in nodes:
        shown.add_row(str(n), *(f"{1e3 * seconds[n, c]:.3f}" for c in contexts))
    console.print(shown)
