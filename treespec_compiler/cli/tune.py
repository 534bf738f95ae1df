"""Measure this machine: how long a model's forward passes take, for `policy="auto"` and the planned trees."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import InvalidOption
from ..program import tree_program
from ..speculation.cost import LatencyTable, fingerprint, latency, table_path
from .generate import parse_options
from .models import DTYPES, load

EPILOG = """\
examples:
  treespec tune --latency --target demo --draft demo
  treespec tune --latency --target hf:PATH --dtype bfloat16
"""


def configure(parser: ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "--latency", action="store_true", help="measure passes of 1 to 64 nodes behind several contexts"
    )
    parser.add_argument("--target", metavar="MODEL", required=True, help="hf:PATH_OR_ID, py:module:factory or demo")
    parser.add_argument("--draft", metavar="MODEL", help="measure this one as well")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of both models (default: float32)")
    parser.add_argument("--random-weights", action="store_true", help="read configurations only (hf: models)")
    parser.add_argument("--option", metavar="NAME=VALUE", action="append", default=[], help="an option of the compiler")


def run(arguments: Namespace) -> int:
    if not arguments.latency:
        raise InvalidOption(name="tune", got="nothing to tune", expected="--latency", fix="Add --latency.")
    console = Console(highlight=False)
    options = parse_options(arguments.option)
    for role, name in (("target", arguments.target), ("draft", arguments.draft)):
        if name is None:
            continue
        kind: Any = role
        model = load(name, role=kind, dtype=DTYPES[arguments.dtype], random_weights=arguments.random_weights)
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
