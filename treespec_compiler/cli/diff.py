"""Compare two graphs by structure: renamed and reordered nodes are equal, changed computations are shown."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ..errors import InvalidOption
from ..ir.provenance import group_of
from ..passes.framework.instruments import Recorder
from ..passes.framework.manager import run_passes, slug
from ..passes.show.compare import Difference, compare
from ..passes.show.printing import line
from ..passes.show.snapshot import NodeData, Snapshot, short_source
from ..pipeline import prepare
from .arguments import add_json, add_model_arguments
from .inspection import console, read_subject

EPILOG = """\
examples:
  treespec diff out/05-recognize-attention.json out/06-classify.json
  treespec diff classify treeify --model demo
  treespec diff capture fuse --model hf:llama --random-weights --tiny --all-layers

A and B are dumps (`treespec opt --dump-dir`, or the graph.json of a reproducer), or names of passes when --model or
--dump-dir is given: the graph after that pass; `capture` is the graph before the first.
exit codes: 0 equal, 1 different, 2 error
"""

_NOTHING = NodeData("", "", "")

MARKS = {"removed": ("-", "red"), "added": ("+", "green"), "changed": ("~", "yellow"), "same": (" ", "dim")}


def configure(parser: ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--dump-dir", metavar="D", type=Path, help="the folder in which passes are looked up")
    parser.add_argument(
        "--context", metavar="N", type=int, default=1, help="equal nodes around each change (default: 1)"
    )
    parser.add_argument("--all-layers", action="store_true", help="show every layer, also those that changed alike")
    add_json(parser)
    add_model_arguments(parser, positional=False)


def run(arguments: Namespace) -> int:
    a, b = _graphs(arguments)
    found = compare(a, b)
    if arguments.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        show(console(), found, arguments.context, arguments.all_layers)
    return 0 if found.equal else 1


def as_json(found: Difference) -> dict[str, Any]:
    head = {"a": found.a.after, "b": found.b.after, "equal": found.equal}
    changed = {n: found.pairs[n] for n in sorted(found.changed)}
    return head | {"removed": found.removed, "added": found.added, "changed": changed}


def _graphs(arguments: Namespace) -> tuple[Snapshot, Snapshot]:
    if arguments.model:
        recorder = Recorder()
        subject = read_subject(arguments)
        prepared = prepare(subject.loaded.model, subject.call, subject.options)
        run_passes(prepared.state, prepared.passes, prepared.checks, (), [recorder])
        graphs = {slug(g.after): g for g in recorder.graphs}
        return _named(arguments.a, graphs), _named(arguments.b, graphs)
    if arguments.dump_dir:
        files = {p.stem.partition("-")[2]: p for p in sorted(arguments.dump_dir.glob("*.json"))}
        return tuple(_read(files.get(slug(n), Path(n))) for n in (arguments.a, arguments.b))  # type: ignore[return-value]
    return _read(Path(arguments.a)), _read(Path(arguments.b))


def _named(name: str, graphs: dict[str, Snapshot]) -> Snapshot:
    if slug(name) in graphs:
        return graphs[slug(name)]
    if Path(name).is_file():
        return _read(Path(name))
    raise InvalidOption(name="A, B", got=name, expected=f"a dump or one of {', '.join(graphs)}")


def _read(path: Path) -> Snapshot:
    try:
        return Snapshot.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = "a graph written by `treespec opt --dump-dir`"
        fix = "To compare passes by name, add --model or --dump-dir."
        raise InvalidOption(name="A, B", got=str(path), expected=expected, fix=fix) from error


def show(out: Console, found: Difference, context: int, all_layers: bool) -> None:
    counts = len(found.removed), len(found.added), len(found.changed)
    out.print(
        f"{found.a.after} → {found.b.after}: {counts[0]} removed, {counts[1]} added, {counts[2]} changed", markup=False
    )
    rows = [(kind, old, new) for kind, old, new in found.rows() if (new or old or _NOTHING).op != "output"]
    names_a, names_b = _names(found.a), _names(found.b)
    near = {j for i, r in enumerate(rows) if r[0] != "same" for j in range(i - context, i + context + 1)}
    seen: dict[Any, str] = {}
    for group, block in _blocks([(i, r) for i, r in enumerate(rows) if i in near]):
        key = tuple((k, x and x.short_target, y and y.short_target, (y or x).type) for _, (k, x, y) in block)
        if group and not all_layers:
            if key in seen:
                out.print(f"@@ {group}: changed as {seen[key]} @@", style="cyan", markup=False)
                continue
            seen[key] = group
        out.print(f"@@ {group or 'outside the layers'} @@", style="cyan", markup=False)
        last, source = -1, ""
        for i, (kind, old, new) in block:
            if last >= 0 and i != last + 1:
                out.print("   …", style="dim")
            last = i
            node: NodeData = new or old
            if kind != "same" and node.source and node.source != source:
                source = node.source
                out.print(Text(f"   # {short_source(source)}", "dim"), soft_wrap=True)
            _show_row(out, kind, old, new, (names_a, names_b), group)


def _show_row(
    out: Console, kind: str, old: NodeData | None, new: NodeData | None, names: tuple[dict[str, str], ...], group: str
) -> None:
    mark, style = MARKS[kind]
    lines = []
    if kind == "changed" and old is not None and new is not None:
        before, after = line_of(old, names[0], group), line_of(new, names[1], group)
        lines = [("-", "red", before), ("+", "green", after)] if before != after else [(mark, style, after)]
    elif kind == "removed" and old is not None:
        lines = [(mark, style, line_of(old, names[0], group))]
    elif new is not None:
        lines = [(mark, style, line_of(new, names[1], group))]
    for sign, color, text in lines:
        out.print(Text(f"{sign}  {text}", color), soft_wrap=True)


def line_of(node: NodeData, names: dict[str, str], group: str) -> str:
    if node.op != "call_function":
        return f"{names.get(node.name, node.name)}: {node.type} (input)"
    return line(node, names, group)


def _names(graph: Snapshot) -> dict[str, str]:
    return {graph.tokens: "tokens"} | {n.name: n.label for n in graph.nodes if n.label}


def _blocks(rows: list[Any]) -> list[tuple[str, list[Any]]]:
    """Rows in a row of the same layer."""
    found: list[tuple[str, list[Any]]] = []
    for i, row in rows:
        node = row[2] or row[1]
        group = group_of(node.layer)[0]
        if not found or found[-1][0] != group:
            found.append((group, []))
        found[-1][1].append((i, row))
    return found
