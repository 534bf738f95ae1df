"""Convert a tiny random model of every causal-LM type of transformers and compare each row with the eager model.

One process for each type, with limits on time and memory. Results are kept as JSON lines, so that an interrupted run
can be resumed, and written to a page and to JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...errors import InvalidOption
from ...logs import logger
from ...options import Options
from ..arguments import positive
from .check import PRELOADED, Result, send_result
from .foreign import installed
from .models import CLASS_OF, model_types
from .report import foreign_section, mesh_page, page, section_of, with_section

log = logger(__name__)

EPILOG = """\
examples:
  treespec coverage --only llama,mixtral,gpt2
  treespec coverage --only mixtral,gpt_oss --experts batched_mm
  treespec coverage --mesh tp=2 --only llama,bloom --output across.md
  treespec coverage --jobs 2 --resume --output docs/coverage.md
  treespec coverage --foreign --output docs/coverage.md
"""

GIB = 1 << 30
KEPT = Path(".treespec-coverage.jsonl")


def configure(parser: ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--only", metavar="A,B,..", help="these types (default: all that transformers has)")
    parser.add_argument("--foreign", action="store_true", help="decoders of other packages, those that are installed")
    parser.add_argument(
        "--experts", metavar="NAME", choices=("grouped_mm", "batched_mm"), help="experts, where a type has a choice"
    )
    parser.add_argument(
        "--mesh", metavar="MESH", help="cut each type for these ranks, such as tp=2, and run them in one process"
    )
    parser.add_argument("--jobs", metavar="N", type=positive, default=1, help="processes at a time (default: 1)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results as JSON")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write a page, such as docs/coverage.md")
    parser.add_argument("--resume", action="store_true", help="keep the results of an interrupted run")
    parser.add_argument(
        "--lines", metavar="FILE", type=Path, default=KEPT, help=f"where they are kept (default: {KEPT})"
    )
    parser.add_argument("--timeout", metavar="S", type=positive, default=300, help="seconds for a type (default: 300)")
    parser.add_argument("--memory", metavar="GIB", type=positive, default=16, help="address space (default: 16)")


def run(arguments: Namespace) -> int:
    """Exit code 1 when a type is wrong (never acceptable), 0 otherwise: a refusal is an answer."""
    types = _asked(arguments.only, arguments.foreign)
    if arguments.mesh is not None:
        Options.parse({"mesh": arguments.mesh})
    done = _kept(arguments.lines) if arguments.resume else {}
    if not arguments.resume:
        arguments.lines.unlink(missing_ok=True)
    console = Console(stderr=True)
    for result in _run_all([t for t in types if t not in done], arguments, console):
        done[result.type] = result
    results = [done[t] for t in types if t in done]
    _write(results, arguments)
    _summary(results)
    return 1 if any(r.verdict == "wrong" for r in results) else 0


def _asked(only: str | None, foreign: bool) -> list[str]:
    known = model_types()
    if foreign:
        known, missing = installed()
        for package in missing:
            log.warning("%s is not installed, or cannot be imported: left out", package)
        if only is not None:
            return [name for name in known if any(name.startswith(part) for part in only.split(","))]
    if only is None:
        return known
    asked = [name for name in only.replace(",", " ").split() if name]
    for name in asked:
        if name not in known:
            fix = "Types are named as in transformers.CONFIG_MAPPING."
            raise InvalidOption(name="--only", got=name, expected="a causal-LM type of transformers", fix=fix)
    return asked


def _kept(path: Path) -> dict[str, Result]:
    if not path.is_file():
        return {}
    lines = (json.loads(line) for line in path.read_text().splitlines() if line.strip())
    return {fields["type"]: Result(**fields) for fields in lines}


def _run_all(types: list[str], arguments: Namespace, console: Console) -> Iterator[Result]:
    """Results as they arrive, each written to the kept lines."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(arguments.jobs) as pool:
        task = progress.add_task("coverage", total=len(types))
        running = [
            pool.submit(run_type, t, arguments.timeout, arguments.memory * GIB, arguments.experts, arguments.mesh)
            for t in types
        ]
        for future in as_completed(running):
            result = future.result()
            with arguments.lines.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
            progress.console.print(_line(result), highlight=False, soft_wrap=True)
            progress.advance(task)
            yield result


def run_type(
    model_type: str, timeout: float, memory: int, experts: str | None = None, mesh: str | None = None
) -> Result:
    """One type in a process of its own."""
    # A process that was ended leaves its locks behind, which is of no interest here.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    result = Result(model_type, CLASS_OF.get(model_type, "N"))
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=send_result, args=(model_type, memory, there, experts, mesh), daemon=True)
    process.start()
    there.close()
    try:
        if here.poll(timeout):
            return cast(Result, here.recv())
        result.reason, result.seconds = f"no answer within {timeout:g} seconds", float(timeout)
    except EOFError:
        process.join(10)
        result.reason = f"the process ended with code {process.exitcode} and no answer"
    finally:
        process.kill()
        process.join()
    return result


def _line(result: Result) -> str:
    found = f"{result.error:.1e}" if result.error is not None else ""
    reason = f"  {result.reason}" if result.reason else ""
    return f"{result.type:<28} {result.cls}  {result.verdict:<8} {found:<8} {result.seconds:5.0f} s{reason}"


def _write(results: list[Result], arguments: Namespace) -> None:
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        old = arguments.output.read_text() if arguments.output.is_file() else ""
        ran = {r.type for r in results}
        missing = [t for t in model_types() if t not in ran]
        if arguments.foreign:
            made = with_section(old, foreign_section(results, installed()[1]))
        elif arguments.mesh is not None:
            made = mesh_page(results, missing, arguments.mesh)
        else:
            made = with_section(page(results, missing), section_of(old))
        arguments.output.write_text(made)


def _summary(results: list[Result]) -> None:
    for verdict in ("exact", "refused", "error", "wrong"):
        names = [r.type for r in results if r.verdict == verdict]
        if names:
            print(f"{verdict}: {len(names)}" + ("" if verdict in ("exact", "refused") else f" ({', '.join(names)})"))
