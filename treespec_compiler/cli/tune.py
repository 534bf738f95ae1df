"""Measure this machine: the kernels of a GPU, or how long a model's forward passes take (for `policy="auto"`)."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import InvalidOption, Unsupported
from ..program.tree_program import tree_program
from ..speculation.cost.latency import LatencyTable, fingerprint, latency, table_path
from .arguments import MODEL, add_option, add_reading, parse_options
from .explain import show_refusal
from .inspection import REFUSED, quiet_torch
from .inspection import console as standard_output
from .models import DTYPES, load
from .tune_kernels import add_limit, tune_model

EPILOG = """\
examples:
  treespec tune demo --device cuda
  treespec tune hf:PATH --device cuda --dtype bfloat16 --shapes 1x1x2048 64x1x2048 --out sm_90.json
  treespec tune --latency --target demo --draft demo

Kernels: configurations are compiled for the GPU at hand; those that spill or do not fit are left out, the rest is
checked against float64 and timed. A run that was stopped goes on where it was.

A table is used where it lies at CACHE/tables/tree_attention/ARCH.json: CACHE is $TREESPEC_CACHE_DIR, else
~/.cache/treespec (or the platform's place for caches), ARCH is the GPU's: sm_90, gfx942. One that --out wrote is used
once it is copied there.

exit codes: 0 measured, 1 the model is refused, 2 error
"""

FOR_KERNELS = {
    "model": "MODEL",
    "device": "--device",
    "shapes": "--shapes",
    "out": "--out",
    "limit": "--limit",
    "again": "--again",
}
FOR_PASSES = {"target": "--target", "draft": "--draft"}


def configure(parser: ArgumentParser) -> None:
    parser.epilog = EPILOG
    kernels = parser.add_argument_group("kernels")
    kernels.add_argument("model", metavar="MODEL", nargs="?", help=MODEL)
    kernels.add_argument("--device", choices=("cuda",), help="tune MODEL's kernels on this device")
    kernels.add_argument("--shapes", metavar="SHAPE", nargs="+", help="NODESxREQUESTSxCONTEXT, such as 64x1x2048")
    kernels.add_argument("--out", metavar="FILE", type=Path, help="the table (default: where it is used, see below)")
    add_limit(kernels, default=None)
    kernels.add_argument("--again", action="store_true", help="measure shapes the table has already")
    passes = parser.add_argument_group("forward passes")
    passes.add_argument(
        "--latency", action="store_true", help="measure passes of 1 to 64 nodes behind several contexts"
    )
    passes.add_argument("--target", metavar="MODEL", help=MODEL)
    passes.add_argument("--draft", metavar="MODEL", help="measure this one as well")
    add_reading(parser)
    add_option(parser)


def run(arguments: Namespace) -> int:
    kernels = f"`treespec tune {arguments.model or arguments.target or 'demo'} --device cuda`"
    passes = f"`treespec tune --latency --target {arguments.target or arguments.model or 'demo'}`"
    if arguments.latency:
        if arguments.model is not None and arguments.target is None:
            expected = "its name behind --target with --latency"
            raise InvalidOption(name="MODEL", got=arguments.model, expected=expected, fix=f"Write {passes}.")
        refuse(arguments, FOR_KERNELS, "with --latency", f"It is for kernels: {kernels}.")
        if arguments.target is None:
            raise InvalidOption(name="--target", got=None, expected="a model with --latency", fix=f"Write {passes}.")
        return measure_passes(arguments)
    refuse(arguments, FOR_PASSES, "without --latency", f"It is for forward passes: {passes}.")
    which = f"{kernels} measures its kernels, {passes} its forward passes."
    if arguments.model is None:
        raise InvalidOption(name="MODEL", got=None, expected="a model", fix=which)
    if arguments.device is None:
        raise InvalidOption(name="--device", got=None, expected="cuda", fix=which)
    return tune_model(arguments)


def refuse(arguments: Namespace, names: dict[str, str], where: str, fix: str) -> None:
    """Raises where an argument was given that this kind of measurement does not read."""
    for attribute, name in names.items():
        given = getattr(arguments, attribute)
        if given is not None and given is not False:
            got = " ".join(given) if isinstance(given, list) else str(given) if isinstance(given, Path) else given
            raise InvalidOption(name=name, got=got, expected=f"no {name} {where}", fix=fix)


def measure_passes(arguments: Namespace) -> int:
    console = Console(highlight=False)
    options = parse_options(arguments.option)
    quiet_torch()
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
        try:
            program = tree_program(model.model, options=options)
        except Unsupported as error:
            show_refusal(standard_output(), name, type(model.model).__name__, error)
            return REFUSED
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
