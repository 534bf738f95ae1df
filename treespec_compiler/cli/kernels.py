"""Show the kernels a model would run on a GPU: source, instructions, registers, spills, shared memory. Needs no GPU."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..codegen.gpu.inventory import Listed, inventory, recurrences, turns
from ..codegen.gpu.offline import TARGETS, Offline
from ..errors import InvalidOption, Unsupported
from ..pipeline import convert
from ..program.semantics import lengths_check
from .arguments import add_json, add_model_arguments
from .explain import refusal_fields, show_refusal
from .inspection import (
    CONVERTED,
    EXIT_CODES,
    REFUSED,
    console,
    need_triton,
    parameter_count,
    read_subject,
)

EPILOG = f"""\
examples:
  treespec kernels demo
  treespec kernels hf:llama --random-weights --tiny --dtype bfloat16 --target sm_80
  treespec kernels demo --kernel attend --source
  treespec kernels demo --kernel attend --sass --resources
  treespec kernels demo --json

tuned (`measured` in JSON): yes where the configuration was measured on such a GPU (`treespec tune`), no where it is a
default, - where there is nothing to choose.
{EXIT_CODES}
"""

# Products on tensor cores, by the names of their instructions: Hopper's and Blackwell's, Ampere's, AMD's.
TENSOR_CORES = ("HGMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA", "HMMA", "v_mfma")

T = TypeVar("T")


def configure(parser: ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_model_arguments(parser)
    parser.add_argument("--target", choices=tuple(TARGETS), default="sm_90", help="architecture (default: sm_90)")
    parser.add_argument("--nodes", metavar="N", type=int, nargs="+", default=[1, 64], help="tree sizes (default: 1 64)")
    parser.add_argument("--kernel", metavar="NAME", help="only kernels of this name")
    what = parser.add_argument_group("what is printed").add_mutually_exclusive_group()
    what.add_argument("--source", action="store_true", help="the Triton source, as it lies in the cache")
    what.add_argument("--ptx", action="store_true", help="PTX, or AMD's assembly")
    what.add_argument("--sass", action="store_true", help="the machine's instructions")
    parser.add_argument("--resources", action="store_true", help="registers, spills and shared memory beside the text")
    add_json(parser)


@dataclass(frozen=True)
class Compiled:
    """A kernel and what became of it on the target."""

    listed: Listed
    offline: Offline

    @property
    def tensor_cores(self) -> str:
        return next((name for name in TENSOR_CORES if self.offline.has(name)), "")

    def as_json(self) -> dict[str, Any]:
        listed, used = self.listed, self.offline.resources
        return {
            "op": listed.op,
            "kernel": listed.name,
            "for": listed.what,
            "file": str(listed.file),
            "constants": {name: _plain(value) for name, value in listed.constants.items()},
            "num_warps": listed.launch.num_warps,
            "num_stages": listed.launch.num_stages,
            "measured": listed.measured,
            "registers": used.registers,
            "stack_bytes": used.stack,
            "shared_bytes": used.shared,
            "shared_limit": used.shared_limit,
            "fits": used.fits,
            "tensor_cores": self.tensor_cores,
        }


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str) else str(value)


def run(arguments: Namespace) -> int:
    if min(arguments.nodes) < 1:
        raise InvalidOption(name="--nodes", got=arguments.nodes, expected="positive numbers of nodes")
    fix = "Install it, no GPU is needed: pip install triton."
    need_triton("generating and compiling GPU kernels", fix)
    subject = read_subject(arguments, kernels="reference")
    try:
        with Console(stderr=True).status("converting"):
            pipeline = subject.options.pipeline or "default,fuse-rope"  # as on a GPU
            options = replace(subject.options, pipeline=pipeline)
            state = convert(subject.loaded.model, subject.call, options).state
            lengths_check(subject.loaded.model, subject.call, state)
    except Unsupported as error:
        _refuse(arguments, subject, error)
        return REFUSED
    logits: Any = state.logits.meta["val"]
    vocab_size = int(logits.shape[-1])
    turned, recurrent = turns(state.graph), recurrences(state.graph)
    kernels = list(
        inventory(state.sites, vocab_size, logits.dtype, arguments.target, arguments.nodes, turned, recurrent)
    )
    if arguments.kernel is not None:
        names = sorted({listed.name for listed in kernels})
        if arguments.kernel not in names:
            raise InvalidOption(name="--kernel", got=arguments.kernel, expected=f"one of {', '.join(names)}")
        kernels = [listed for listed in kernels if listed.name == arguments.kernel]
    compiled = _with_progress(kernels, lambda listed: Compiled(listed, listed.launch.compile(arguments.target)))
    if arguments.json:
        rows = [c.as_json() | _text(arguments, c) for c in compiled]
        print(json.dumps({"model": subject.name, "target": arguments.target, "kernels": rows}, indent=2))
    elif arguments.source or arguments.ptx or arguments.sass:
        _print_texts(arguments, compiled)
    else:
        title = f"{subject.name}, {parameter_count(subject.loaded)} parameters, {arguments.dtype}, {arguments.target}"
        _print_table(console(), title, compiled)
    return CONVERTED


def _refuse(arguments: Namespace, subject: Any, error: Unsupported) -> None:
    if arguments.json:
        print(json.dumps({"model": subject.name, "converted": False} | refusal_fields(error), indent=2))
    else:
        show_refusal(console(), subject.name, type(subject.loaded.model).__name__, error)


def _with_progress(kernels: list[Listed], work: Callable[[Listed], T]) -> list[T]:
    done = []
    with Console(stderr=True).status("") as status:
        for i, listed in enumerate(kernels, 1):
            status.update(f"compiling {i} of {len(kernels)}: {listed.name}")
            done.append(work(listed))
    return done


def _text(arguments: Namespace, compiled: Compiled) -> dict[str, str]:
    """The text that was asked for, by its kind."""
    if arguments.source:
        return {"source": compiled.listed.source}
    if arguments.ptx:
        return {"ptx": compiled.offline.ptx}
    return {"sass": compiled.offline.sass} if arguments.sass else {}


def _print_texts(arguments: Namespace, compiled: list[Compiled]) -> None:
    """Each kernel's text below comment lines that say which it is; sources of one file once."""
    seen = set()
    for one in compiled:
        (text,) = _text(arguments, one).values()
        if text in seen:
            continue
        seen.add(text)
        mark = "#" if arguments.source else "//"
        print(f"{mark} {one.listed.name}: {one.listed.what}\n{mark} {one.listed.file}")
        if arguments.resources:
            print(f"{mark} {_resources(one)}")
        print(text.rstrip() + "\n")


def _resources(one: Compiled) -> str:
    used = one.offline.resources
    spills = f"{used.stack} bytes of stack" if used.spills else "no spills"
    fits = "" if used.shared <= used.shared_limit else f" (more than the {used.shared_limit} of a block)"
    with_tensor_cores = f", {one.tensor_cores}" if one.tensor_cores else ""
    return f"{used.registers} registers, {spills}, {used.shared} bytes shared{fits}{with_tensor_cores}"


def _block(one: Compiled) -> str:
    return "x".join(str(v) for n, v in one.listed.constants.items() if n.startswith("BLOCK_")) or "-"


def _tuned(one: Compiled) -> str:
    return {None: "-", True: "yes", False: "no"}[one.listed.measured]


def _spills(one: Compiled) -> Text:
    used = one.offline.resources
    return Text(f"{used.stack} B", "red") if used.spills else Text("none")


def _shared(one: Compiled) -> Text:
    used = one.offline.resources
    return Text(f"{used.shared:,} B", "" if used.shared <= used.shared_limit else "red")


@dataclass(frozen=True)
class Column:
    heading: str
    short: str
    """The heading where there is little room."""
    cell: Callable[[Compiled], str | Text]
    justify: Literal["left", "right"] = "right"


COLUMNS = (
    Column("kernel", "kernel", lambda one: one.listed.name, "left"),
    Column("for", "for", lambda one: one.listed.what, "left"),
    Column("block", "block", _block),
    Column("warps", "warps", lambda one: str(one.listed.launch.num_warps)),
    Column("stages", "stages", lambda one: str(one.listed.launch.num_stages)),
    Column("tuned", "tuned", _tuned),
    Column("registers", "regs", lambda one: str(one.offline.resources.registers)),
    Column("spills", "spills", _spills),
    Column("shared", "shared", _shared),
    Column("tensor cores", "tensor\ncores", lambda one: one.tensor_cores or "-", "left"),
)
LEAST_USEFUL = ("stages", "warps", "block", "tuned", "tensor cores", "shared", "registers", "spills")
"""Columns to leave out where a terminal is too narrow, in this order."""
FOLDED = 26
"""Characters at which the column `for` may be folded, before another column is left out for it."""
GAP = 2


def _print_table(out: Console, title: str, compiled: list[Compiled]) -> None:
    columns, headings = _fitting(compiled, out.width)
    table = Table(box=None, pad_edge=False, padding=(0, GAP // 2), header_style="bold")
    for column, heading in zip(columns, headings, strict=True):
        table.add_column(heading, justify=column.justify, no_wrap=column.heading != "for", overflow="fold")
    for one in compiled:
        table.add_row(*(_text_of(column, one) for column in columns))
    out.print(title, style="italic", markup=False, soft_wrap=True)
    out.print(table)
    left_out = [column.heading for column in COLUMNS if column not in columns]
    if left_out:
        out.print(f"no room for: {', '.join(left_out)}; --json shows everything", style="dim")
    files = sorted({str(one.listed.file) for one in compiled})
    out.print("\nsource (`--source` prints it):")
    for file in files:
        out.print(f"  {file}", markup=False, soft_wrap=True)


def _text_of(column: Column, one: Compiled) -> Text:
    cell = column.cell(one)
    return cell if isinstance(cell, Text) else Text(cell)


def _fitting(compiled: list[Compiled], width: int) -> tuple[list[Column], list[str]]:
    """The columns that `width` has room for, and their headings."""
    columns, headings = list(COLUMNS), []
    for dropped in (None, *LEAST_USEFUL):
        columns = [column for column in columns if column.heading != dropped]
        for headings in ([c.heading for c in columns], [c.short for c in columns]):
            if _width(columns, headings, compiled) <= width:
                return columns, headings
    return columns, headings


def _width(columns: list[Column], headings: list[str], compiled: list[Compiled]) -> int:
    """Of the table, with `for` folded."""
    total = GAP * (len(columns) - 1)
    for column, heading in zip(columns, headings, strict=True):
        needed = max(map(len, heading.split("\n")))
        needed = max([needed, *(_text_of(column, one).cell_len for one in compiled)])
        total += min(needed, FOLDED) if column.heading == "for" else needed
    return total
