"""Run the pipeline on a model, or a part of it, and print the graph between passes, as `mlir-opt` does."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from ..errors import InvalidPipeline, Unsupported
from ..options import VerifyEach
from ..passes.framework.found import built_in
from ..passes.framework.instruments import Dumper, GraphPrinter, Recorder, always
from ..passes.framework.manager import History, Instrument, Pass, run_passes, slug
from ..passes.framework.plan import plan
from ..passes.framework.registry import registered_passes
from ..passes.framework.reproducer import ReproducerWriter
from ..passes.show.printing import FORMATS, render
from ..passes.show.snapshot import Snapshot
from ..passes.show.view import View
from ..pipeline import prepare
from ..program.semantics import semantic_check
from .arguments import add_model_arguments
from .inspection import CONVERTED, EXIT_CODES, REFUSED, console, read_subject

EPILOG = f"""\
examples:
  treespec opt demo                                    the graph after the last pass
  treespec opt demo --print-after treeify --layer 3    one pass, layer 3 standing for all like it
  treespec opt demo --site 0 --stop-after classify     the first attention module after classify
  treespec opt hf:PATH --pipeline -fuse --timing --print-after-change
  treespec opt py:mypackage.models:build --verify-each semantic --dump-dir out

A pipeline is read from left to right: `default` is every pass, a name adds one, `-name` takes one out.
{EXIT_CODES}
"""


def configure(parser: ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_model_arguments(parser)
    run_group = parser.add_argument_group("pipeline")
    run_group.add_argument("--pipeline", metavar="A,B,-C", help="passes to run (default: default)")
    run_group.add_argument("--stop-after", metavar="P", help="run no pass behind this one")
    run_group.add_argument(
        "--verify-each", choices=("none", "spec", "semantic"), help="what is checked after every pass (default: spec)"
    )
    show = parser.add_argument_group("printing (without any of these, the last graph is printed)")
    show.add_argument("--print-before", metavar="P", action="append", default=[], help="may be repeated")
    show.add_argument("--print-after", metavar="P", action="append", default=[], help="may be repeated")
    show.add_argument("--print-after-all", action="store_true")
    show.add_argument("--print-after-change", action="store_true", help="after passes that changed the graph")
    show.add_argument("--print-on-failure", action="store_true", help="the graph as the failing pass left it")
    show.add_argument("--timing", action="store_true", help="a table of seconds, matches and nodes")
    show.add_argument("--format", choices=FORMATS, default="code")
    which = show.add_mutually_exclusive_group()
    which.add_argument(
        "--layer", metavar="N", type=int, help="layer shown for all of its structure (default: the first)"
    )
    which.add_argument("--site", metavar="NAME", help="show only the module of this attention site, by name or number")
    which.add_argument("--all-layers", action="store_true", help="fold nothing")
    files = parser.add_argument_group("files")
    files.add_argument("--dump-dir", metavar="D", type=Path, help="write the graph after every pass here")
    files.add_argument("--reproducer", metavar="D", type=Path, help="where a failure, a refusal included, is written")


def run(arguments: Namespace) -> int:
    verify: VerifyEach | None = arguments.verify_each
    subject = read_subject(arguments, pipeline=arguments.pipeline, verify_each=verify)
    passes = _cut(plan(subject.options.pipeline, built_in(), registered_passes()), arguments.stop_after)
    view = View(arguments.layer, arguments.site, not arguments.all_layers)
    out = console()

    def show(title: str, graph: Snapshot) -> None:
        if arguments.format == "code":
            out.print(f"[bold]# ── {title} ──[/]" if out.is_terminal else f"# ── {title} ──", markup=out.is_terminal)
        print_graph(out, graph, arguments.format, view)

    wanted = _names(arguments.print_before, passes), _names(arguments.print_after, passes)
    after = frozenset("*") if arguments.print_after_all else wanted[1]
    printer = GraphPrinter(show, wanted[0], after, arguments.print_after_change, arguments.print_on_failure)
    recorder = Dumper(folder=arguments.dump_dir) if arguments.dump_dir else Recorder()
    reproducer = ReproducerWriter(subject.options, arguments.reproducer, arguments.model, bool(arguments.reproducer))
    instruments: list[Instrument] = [*always(), recorder, printer, reproducer]
    meaning = [semantic_check(subject.loaded.model, subject.call)]
    try:
        with Console(stderr=True).status("capturing"):
            prepared = prepare(subject.loaded.model, subject.call, subject.options)
        steps = _cut(prepared.passes, arguments.stop_after, missing_ok=True)
        checks = [*prepared.checks, *(meaning if subject.options.verify_each == "semantic" else ())]
        history = run_passes(prepared.state, steps, checks, meaning, instruments)
    except Unsupported as error:
        lines = [str(error), *getattr(error, "__notes__", ())]
        print("treespec: refused:", "\n".join(lines), file=sys.stderr)
        return REFUSED
    quiet = not (wanted[0] or after or arguments.print_after_change or arguments.timing or arguments.dump_dir)
    if quiet:
        print_graph(out, recorder.graphs[-1], arguments.format, view)
    if arguments.timing:
        show_timing(out, history, prepared.capture_seconds)
    if arguments.dump_dir:
        print(f"treespec: {len(recorder.graphs)} graphs in {arguments.dump_dir}", file=sys.stderr)
    return CONVERTED


def _cut(passes: list[Pass], stop_after: str | None, missing_ok: bool = False) -> list[Pass]:
    if stop_after is None:
        return passes
    names = [p.slug for p in passes]
    if slug(stop_after) in names:
        return passes[: names.index(slug(stop_after)) + 1]
    if missing_ok:  # a pass that this device has no kernels for
        return passes
    raise unknown_pass(stop_after, names)


def _names(names: list[str], passes: list[Pass]) -> frozenset[str]:
    """Slugs of passes; a name outside the pipeline is an error."""
    known = [p.slug for p in passes]
    for name in names:
        if slug(name) not in known:
            raise unknown_pass(name, known)
    return frozenset(map(slug, names))


def unknown_pass(name: str, known: list[str]) -> InvalidPipeline:
    return InvalidPipeline(got=f"no pass {name!r} in it", expected=f"one of {', '.join(known)}")


def print_graph(out: Console, graph: Snapshot, format: str, view: View) -> None:
    """On a terminal in colour and cut to its width; anywhere else as it is."""
    text = render(graph, format, view)
    if out.is_terminal and format in ("code", "json"):
        lexer = "python" if format == "code" else "json"
        out.print(Syntax(text, lexer, theme="ansi_dark", background_color="default", word_wrap=False))
    else:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stdout.flush()


def show_timing(out: Console, history: History, capture_seconds: float) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("pass")
    for column in ("ms", "%", "matches", "nodes"):
        table.add_column(column, justify="right")
    total = sum(r.seconds for r in history) or 1.0
    for record in history:
        nodes = f"{record.nodes_before} → {record.nodes_after}" if record.changed else f"{record.nodes_after}"
        percent = f"{100 * record.seconds / total:.0f}"
        table.add_row(slug(record.name), f"{record.seconds * 1e3:.1f}", percent, str(record.matches), nodes)
    out.print(table)
    out.print(f"passes {total:.2f} s, capture before them {capture_seconds:.2f} s")
