"""What the benchmarks share: models, interleaved timing, quartiles, a description of the machine, tables and JSON."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from treespec_compiler import demo
from treespec_compiler.versions import versions

RESULTS = Path(__file__).parent / "results" / "cpu"


def describe_run(threads: int | Sequence[int]) -> dict[str, Any]:
    """Where, when and with what a benchmark ran; several numbers of threads: it ran with each."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain", "-uno") else ""),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions("torch", "triton", "transformers", "numpy"),
    }


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return ""
    return result.stdout.strip()


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def read_report(path: Path, *keys: str, benchmark: str | None = None) -> dict[str, Any]:
    """A report of this benchmark with these keys; ends the program in one line where the file holds none."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        why = error.strerror
    except ValueError as error:
        why = f"not JSON: {error}"
    else:
        missing = [key for key in keys if key not in report] if isinstance(report, dict) else list(keys)
        other = isinstance(report, dict) and report.get("benchmark") != benchmark
        if not missing and not other:
            return report
        why = f"it has no {missing[0]!r}" if missing else f"it is of the benchmark {report.get('benchmark')!r}"
    sys.exit(f"got {str(path)!r}, expected a file that this script wrote: {why}")


def load_pair(target: Path | None, draft: Path | None, count: int) -> tuple[Any, Any, list[list[int]]]:
    """Models, and the token ids of `count` held-out prompts from all over their list.

    The demo's, or those of two folders; their heldout.json lies beside the target's.
    """
    if (target is None) != (draft is None):
        given, other = ("target", "draft") if draft is None else ("draft", "target")
        sys.exit(f"got --{given} alone, expected --{other} as well, or neither: the shipped pair.")
    if target is None or draft is None:
        models = demo.load_target(), demo.load_draft()
        tokenizer, texts = demo.load_tokenizer(), [prompt.text for prompt in demo.heldout_prompts()]
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        models = tuple(AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in (target, draft))
        tokenizer = AutoTokenizer.from_pretrained(target)
        texts = [item["text"] for item in json.loads((target.parent / "heldout.json").read_text(encoding="utf-8"))]
    texts = texts[:: max(1, len(texts) // count)][:count]
    return *models, [tokenizer(text)["input_ids"] for text in texts]


@dataclass(frozen=True)
class Quartiles:
    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        if len(values) < 2:
            return cls(*[*values, *values, *values])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def __format__(self, spec: str) -> str:
        """`median (low-high)`, each in `spec`."""
        return f"{self.median:{spec}} ({self.low:{spec}}-{self.high:{spec}})"


def orders(count: int) -> list[list[int]]:
    """Orders of `count` things in which each follows every other one equally often (a Williams design)."""
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(count)]
    rows = [[(step + shift) % count for step in zigzag] for shift in range(count)]
    return rows if count % 2 == 0 else [row for square in (rows, [r[::-1] for r in rows]) for row in square]


def interleave(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    burst: int = 8,
    warm_up: int = 2,
    prepare: Mapping[str, Callable[[], object]] | None = None,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of single calls. In every round each function gets a burst, of which the first calls are not counted:
    they find the caches full of another one's data. `prepare` runs before every call, untimed."""
    names = list(functions)
    prepares = prepare or {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    sequence = orders(len(names))
    for count in range(rounds):
        for index in sequence[count % len(sequence)]:
            name = names[index]
            call, before = functions[name], prepares.get(name)
            for repeat in range(warm_up + burst):
                if before is not None:
                    before()
                began = time.perf_counter()
                call()
                ended = time.perf_counter()
                if repeat >= warm_up:
                    seconds[name].append(ended - began)
        advance()
    return seconds


def settle() -> None:
    """Collect garbage and leave what lives out of later collections: a full one takes as long as a hundred tokens."""
    gc.collect()
    gc.freeze()


@dataclass
class Table:
    """Text cells, the first column left-aligned; rows named in `bold` stand out."""

    title: str
    headings: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    bold: set[int] = field(default_factory=set)

    def add(self, *cells: str, bold: bool = False) -> None:
        if bold:
            self.bold.add(len(self.rows))
        self.rows.append(cells)

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for index, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if index else "left", no_wrap=index == 0)
        for index, row in enumerate(self.rows):
            table.add_row(*row, style="bold" if index in self.bold else None)
        return table

    def markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cells) + " |"

        marked = [[f"**{c}**" if i in self.bold and c else c for c in row] for i, row in enumerate(self.rows)]
        rule = ["---", *["---:"] * (len(self.headings) - 1)]
        return "\n".join([f"{self.title}:", "", line(self.headings), line(rule), *map(line, marked)])


def show(tables: Sequence[Table], notes: Sequence[str], markdown: bool = False) -> None:
    """Print tables and the sentences below them."""
    if markdown:
        print("\n\n".join([*[table.markdown() for table in tables], *notes]))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    for table in tables:
        console.print(table.rich())
    for note in notes:
        console.print(note, markup=False)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar with a changing text, moved on by every call; a line for each text where there is no terminal."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        began = time.perf_counter()
        yield lambda text: console.print(f"{time.perf_counter() - began:6.0f} s  {text}", markup=False)
        return
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        done = -1

        def say(text: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done, description=text)

        yield say
