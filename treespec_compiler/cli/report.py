"""Write one self-contained HTML page: timeline, every pass before and after, masks as pictures, a token tree."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.console import Console

from ..inspection.report.collect import collect
from ..inspection.report.page import page
from .arguments import add_model_arguments
from .inspection import CONVERTED, EXIT_CODES, REFUSED, read_subject

EPILOG = f"""\
examples:
  treespec report demo -o report.html
  treespec report hf:gemma2 --random-weights --tiny -o gemma2.html

The page needs no network. A refused model gets a page too, up to the pass that refused it.
{EXIT_CODES}
"""


def configure(parser: ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_model_arguments(parser)
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, default=Path("report.html"), help="default: report.html"
    )
    parser.add_argument("--pipeline", metavar="A,B,-C", help="passes to run (default: default)")


def run(arguments: Namespace) -> int:
    subject = read_subject(arguments, pipeline=arguments.pipeline)
    with Console(stderr=True).status("converting"):
        content = collect(subject.loaded.model, subject.name, subject.call, subject.options)
    arguments.output.write_text(page(content), encoding="utf-8")
    size = arguments.output.stat().st_size / 1e6
    print(f"treespec: {arguments.output}, {size:.1f} MB", file=sys.stderr)
    if compared := content.get("compared"):
        print(f"treespec: compared with the eager model, run op by op: {compared}", file=sys.stderr)
    if content["failure"]:
        print(f"treespec: not converted\n{content['failure']}", file=sys.stderr)
    return REFUSED if content["failure"] else CONVERTED
