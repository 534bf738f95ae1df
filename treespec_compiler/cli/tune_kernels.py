"""`treespec tune MODEL --device cuda`: the kernels of a model, measured on the GPU at hand."""

from __future__ import annotations

import tempfile
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from ..codegen import tables
from ..codegen.gpu.inventory import attention_kernels
from ..codegen.gpu.offline import TARGETS
from ..codegen.gpu.tree_attention_spec import AttentionKernel, default_config
from ..codegen.gpu.trial import Workload
from ..codegen.gpu.tune import OP, SHAPES, Outcome, Tuner, tune
from ..codegen.tables import TuningTable
from ..errors import CorruptTable, InvalidOption, Unsupported
from ..pipeline import convert
from .arguments import TakesArguments
from .explain import show_refusal
from .inspection import REFUSED, need_triton, read_subject
from .inspection import console as standard_output

# Configurations a shape, those nearest to the default: all shapes of a kernel then have 14 to 20 together instead of
# 93. Each is compiled about seven times: once to be judged, then split or not, for one request or several, as checks
# and timings launch it. At 0.5 to 1.5 s a compilation that is one to four minutes a kernel instead of 5 to 16.
LIMIT = 8


def add_limit(parser: TakesArguments, default: int | None = LIMIT) -> None:
    """`--limit`: 0 stands for no limit. `default`: None tells a limit that was given from one that was not."""
    what = f"at most N configurations a shape, 0: all (default: {LIMIT})"
    parser.add_argument("--limit", metavar="N", type=_number, default=default, help=what)


def _number(text: str) -> int:
    if not text.isdecimal():
        raise ArgumentTypeError(f"got {text!r}, expected a number of configurations, 0 for all")
    return int(text)


def tune_model(arguments: Namespace) -> int:
    shapes = parse_shapes(arguments.shapes) if arguments.shapes else list(SHAPES)
    limit = LIMIT if arguments.limit is None else arguments.limit
    device = gpu()
    arch = tables.architecture(device)
    used = tables.user_path(OP, arch)
    path = arguments.out or used
    check_place(path)
    check_content(path, arch, named=arguments.out is not None)
    subject = read_subject(arguments, kernels="reference")
    try:
        with Console(stderr=True).status("converting"):
            state = convert(subject.loaded.model, subject.call, subject.options).state
    except Unsupported as error:
        show_refusal(standard_output(), subject.name, type(subject.loaded.model).__name__, error)
        return REFUSED
    specs = list(attention_kernels(state.sites))
    tune_kernels(specs, shapes, device, path, limit=limit or None, again=arguments.again)
    if path.resolve() not in {place.resolve() for place in (used, tables.shipped_path(OP, arch))}:
        what = f"nothing is read from there: to use it, copy it to {used}"
        Console(stderr=True, highlight=False).print(what, markup=False, soft_wrap=True)
    return 0


def parse_shapes(texts: Sequence[str]) -> list[Workload]:
    try:
        return [Workload.parse(text) for text in texts]
    except InvalidOption as error:
        raise replace(error, name="--shapes") from None


def check_place(path: Path) -> None:
    """Makes the folder; raises InvalidOption where a table cannot be written at `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent):
            problem = "" if path.is_file() or not path.exists() else "it is no file"
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise InvalidOption(
            name="--out",
            got=str(path),
            expected=f"a file that can be written ({problem})",
            fix="Name another one, or set TREESPEC_CACHE_DIR and leave --out out.",
        )


def check_content(path: Path, arch: str, named: bool) -> None:
    """Raises CorruptTable where `path` holds something else than a table of this GPU, InvalidOption if --out named it:
    it may then be no table at all."""
    try:
        if path.is_file():
            tables.read(path, OP, arch)
    except CorruptTable as error:
        if not named:
            raise
        raise InvalidOption(
            name="--out",
            got=str(path),
            expected=f"a new file or a tuning table of {OP} on {arch} (found: {error.problem})",
            fix="Name another one.",
        ) from error


def gpu() -> torch.device:
    """The GPU to measure on; raises where there is none, or nothing that compiles for it."""
    if not torch.cuda.is_available():
        raise InvalidOption(
            name="--device",
            got="cuda",
            expected=f"a GPU that torch can use (torch {torch.__version__} sees none)",
            fix="Run this on a machine with one; `treespec kernels MODEL --target sm_90` compiles without.",
        )
    need_triton("GPU kernels", "Install it: pip install triton.")
    device = torch.device("cuda", torch.cuda.current_device())
    arch = tables.architecture(device)
    if arch not in TARGETS:
        raise InvalidOption(
            name="--device", got=arch, expected=" or ".join(TARGETS), fix="No kernels are tuned for it."
        )
    return device


def tune_kernels(
    specs: Sequence[AttentionKernel],
    shapes: Sequence[Workload],
    device: torch.device,
    path: Path,
    limit: int | None = None,
    again: bool = False,
    budget: float = 0.02,
) -> TuningTable:
    """Measure every kernel for every shape and keep the table at `path`, with a progress bar.

    Shapes that no configuration is right for are left out; raises InvalidOption where that is all of them.
    """
    from ..codegen.gpu.tune_device import DeviceBench, empty_table

    arch = tables.architecture(device)
    table = tables.resumed(path, empty_table(arch, device))
    done: list[Outcome] = []
    unfit: dict[str, list[str]] = {}
    console = Console(stderr=True, highlight=False)
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(specs) * len(shapes))

        def finished(outcome: Outcome) -> None:
            done.append(outcome)
            if why := default_left_out(tuner, outcome):
                unfit.setdefault(why, []).append(outcome.name)
            bar.advance(task)

        for spec in specs:
            bench = DeviceBench(spec, device, budget)
            tuner = Tuner(
                spec, arch, bench.check, bench.measure, limit=limit, say=lambda t: bar.update(task, description=t)
            )
            table = tune(tuner, shapes, table, lambda t: tables.write(path, t), again, finished)
    console.print(summary(done))
    for why, names_of in unfit.items():
        what = f"default configuration left out for {', '.join(names_of)}: {why}"
        console.print(what, markup=False, soft_wrap=True)
    left_out = [outcome for outcome in done if outcome.why]
    if left_out and len(left_out) == len(done):
        raise InvalidOption(
            name="--shapes",
            got=", ".join(dict.fromkeys(str(outcome.shape) for outcome in left_out)),
            expected="one that a configuration is right for",
            fix=f"Nothing could be tuned; {left_out[0].name}: {left_out[0].why}.",
        )
    if left_out:
        names = ", ".join(outcome.name for outcome in left_out)
        console.print(f"left out {len(left_out)} of {len(done)} shapes: {names}", markup=False, soft_wrap=True)
    console.print(f"{len(table.entries)} entries in {path}", markup=False, soft_wrap=True)
    return table


def default_left_out(tuner: Tuner, outcome: Outcome) -> str:
    """Why the default configuration was not worth running; empty: it was, or the shape was measured before."""
    if outcome.entry is None and not outcome.why:
        return ""
    default = default_config(tuner.spec, outcome.shape.nodes * tuner.spec.group, tuner.target)
    why = tuner.rejected.get(default)
    return f"{why} with {describe(default.as_dict())}" if why else ""


def summary(done: Sequence[Outcome]) -> RichTable:
    table = RichTable(box=None, pad_edge=False, header_style="bold")
    table.add_column("shape", no_wrap=True)
    for name in ("us", "configuration", "second, us", "its configuration"):
        table.add_column(name, justify="right" if "us" in name.split() else "left")
    for outcome in done:
        shape, entry = outcome.shape, outcome.entry
        if entry is None:
            what = f"left out: {outcome.why}" if outcome.why else "measured before (--again measures it again)"
            table.add_row(str(shape), "", escape(what))
            continue
        second = entry.runner_up
        cells = (f"{second['us']:.1f}", describe(second["config"])) if second else ("-", "-")
        table.add_row(str(shape), f"{entry.us:.1f}", describe(entry.config), *cells)
    return table


def describe(config: object) -> str:
    return ", ".join(f"{n} {v}" for n, v in dict(config).items())  # type: ignore[call-overload]
