"""List the passes of the pipeline in order: contract, level, source hash, and whether it can be left out."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..passes.framework.found import built_in
from ..passes.framework.manager import Pass
from ..passes.framework.plan import needed_level, plan
from ..passes.framework.registry import registered_passes
from .arguments import add_json
from .inspection import console

EPILOG = """\
examples:
  treespec passes
  treespec passes --pipeline default,my-pass,-fuse
  treespec passes --json

Your own passes: docs/writing-a-pass.md. They appear here once registered under the entry point `treespec.passes`.
"""


def configure(parser: ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--pipeline", metavar="A,B,-C", help="show this pipeline instead of the default one")
    add_json(parser)


def run(arguments: Namespace) -> int:
    others = registered_passes()
    passes = plan(arguments.pipeline, built_in(), others)
    idle = [p for p in (*built_in(), *others.values()) if p not in passes]
    rows = [describe(p) for p in passes]
    if arguments.json:
        print(json.dumps({"pipeline": rows, "registered": [describe(p) for p in idle]}, indent=2))
        return 0
    out = console()
    for i, row in enumerate(rows, 1):
        kind = "optional" if row["optional"] else "proof" if not row["changes"] else "rewrite"
        kind += ", yours" if row["user"] else ""
        out.print(f"[dim]{i:>2}[/] [bold]{row['name']}[/]  [dim]{kind}, source {row['source_hash']}[/]")
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
        table.add_column(width=9, style="dim", justify="right")
        table.add_column(overflow="fold")
        table.add_row("takes", escape(row["before"]))
        level = f"  [level {row['level']}]" if row["level"] else ""
        table.add_row("leaves", escape(row["after"] + level))
        out.print(table)
    if idle:
        out.print()
        out.print("known, not in this pipeline: " + ", ".join(p.slug for p in idle))
    return 0


def describe(step: Pass) -> dict[str, Any]:
    """A pass as JSON."""
    return {
        "name": step.slug,
        "before": step.before,
        "after": step.after,
        "needs": needed_level(step, built_in()),
        "level": step.level,
        "source_hash": step.source_hash,
        "optional": step.optional,
        "changes": step.changes,
        "user": step.user,
    }
