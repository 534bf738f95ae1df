"""Everything that only a GPU can tell, in one run of less than eight minutes.

    python benchmarks/gpu_suite.py                                # on the GPU at hand
    python benchmarks/gpu_suite.py --only numerics attention      # some sections; `numerics`: all parts of it
    python benchmarks/gpu_suite.py --all                          # and linears joined or apart
    python benchmarks/gpu_suite.py --show FILE --markdown         # the tables of a run
    python benchmarks/gpu_suite.py --device cpu --smoke           # whether the script runs at all; no figures

Each section is a process with a time of its own: one that fails or takes too long leaves what it had measured, and the
others run; time that one leaves goes to the next. Caches are new, and 8B has new ones of its own, so its compilation is
cold; `compile again` repeats it with what 8B left there.

Results: benchmarks/results/<device>/gpu_suite.json, written again after every section; those of a run with --only go to
gpu_suite-<sections>.json beside it. A smoke run writes nothing without --out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Table, describe_run, read_report, show, write_json
from gpu_sections import report
from gpu_sections.base import Context

RESULTS = Path(__file__).parent / "results"
TOTAL = 465.0
"""Seconds in all: under eight minutes with what starting and writing takes."""


@dataclass(frozen=True)
class Section:
    name: str
    module: str
    budget: float
    """Seconds, the start of the process included."""
    arguments: tuple[str, ...] = ()
    beside: bool = False
    """Runs at the same time as the section before; for sections that time nothing, or first compile for a minute."""
    caches: str = "all"
    """Sections that name the same ones share what compilers keep."""

    def is_named(self, text: str) -> bool:
        """By its whole name, or by what comes before the space: that names all parts."""
        return text in (self.name, self.name.partition(" ")[0])


# What does not fit into its time is left out and said so; together they fit into TOTAL.
SECTIONS = (
    Section("numerics 1", "numerics", 75, ("0", "3")),
    *(Section(f"numerics {i + 1}", "numerics", 75, (str(i), "3"), beside=True) for i in (1, 2)),
    *(Section(f"oracle {i + 1}", "oracle", 75, (str(i), "4"), beside=True) for i in range(4)),
    Section("tune", "tune", 30),
    Section("attention", "attention", 70),
    Section("step 8B", "steps", 125, ("8B",), caches="8B"),
    Section("compile again", "compile_again", 40, ("8B",), caches="8B"),
    Section("step 1B", "steps", 70, ("1B",)),
    Section("decode", "decode", 40),
)
# Run where --only names them; with --all, `variants` runs beside the checks.
VARIANTS = Section("variants", "variants", 115, ("8B",), beside=True, caches="variants")
MORE = (VARIANTS, Section("splits", "splits", 60))


def main() -> None:
    arguments = parse()
    if arguments.run_section:
        run_section(arguments)
        return
    if arguments.show:
        print_report(read_report(arguments.show, "status"), arguments.markdown)
        return
    why = obstacle(arguments)
    if why:
        print(f"gpu_suite: not measured: {why}", file=sys.stderr)
        if arguments.out:
            write_json(arguments.out, {"status": "not measured", "reason": why, "run": about("cpu")})
        raise SystemExit(1)
    path = arguments.out or results_path(arguments)
    found = run(arguments, path)
    if path:
        print(f"written to {path}", file=sys.stderr)
    print_report(found, arguments.markdown)
    raise SystemExit(1 if any(report.failures(found["sections"])) else 0)


def results_path(arguments: argparse.Namespace) -> Path | None:
    """Where figures are kept: by device, and apart where they are of some sections only."""
    if arguments.smoke:
        return None
    some = "-".join(["", *map(slug, arguments.only or ())])
    return RESULTS / slug(torch.cuda.get_device_name()) / f"gpu_suite{some}.json"


def parse() -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all?")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", type=section_name, metavar="NAME", help=f"of {', '.join(bare_names())}")
    which.add_argument("--all", action="store_true", help="linears joined or apart as well")
    parser.add_argument("--budget", type=seconds, default=TOTAL, help=f"seconds in all (default: {TOTAL:.0f})")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--keep-caches", action="store_true", help="use the caches there are; compilation is warm then")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the tables of a run and measure nothing")
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    for hidden in ("--run-section", "--section-out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--section-end", type=float, help=argparse.SUPPRESS)  # as of time.time()
    return parser.parse_args()


def bare_names() -> list[str]:
    """Names of sections without what tells the parts of one from each other."""
    return list(dict.fromkeys(section.name.partition(" ")[0] for section in (*SECTIONS, *MORE)))


def section_name(text: str) -> str:
    if not any(section.is_named(text) for section in (*SECTIONS, *MORE)):
        expected = f"{', '.join(bare_names())}, or one part such as {SECTIONS[0].name!r}"
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
    return text


def seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected seconds, more than 0")
    return found


def obstacle(arguments: argparse.Namespace) -> str:
    """Why nothing can be measured here; empty: it can."""
    if arguments.device == "cpu":
        return "" if arguments.smoke else "a CPU has no GPU's figures (--smoke tries the script out)"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return ""


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def run(arguments: argparse.Namespace, path: Path | None) -> dict[str, Any]:
    """All sections, one after the other, within the time; `path` gets what there is after each of them."""
    began = time.perf_counter()
    found = {"status": "smoke" if arguments.smoke else "measured", "run": about(arguments.device), "sections": {}}
    sections: dict[str, Any] = found["sections"]
    waiting = groups(asked(arguments.only or (), arguments.all))
    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as name:
        folder = Path(name)
        while waiting:
            group = waiting.pop(0)
            left = arguments.budget - (time.perf_counter() - began)
            if left < 10:
                sections |= {section.name: {"status": "no time left"} for section in group}
                continue
            spare = max(0.0, left - sum(max(s.budget for s in later) for later in (group, *waiting)))
            names = ", ".join(section.name for section in group)
            print(f"{names} ({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)
            started = [Running(arguments, s, min(s.budget + spare, left), folder, len(group)) for s in group]
            sections |= {one.section.name: one.results() for one in started}
            tables = folder.glob("tree_attention-*.json")
            found["tuning_tables"] = {t.stem.partition("-")[2]: json.loads(t.read_text()) for t in tables}
            found["seconds"] = time.perf_counter() - began
            found["projection"] = report.projection(sections)
            if path:
                write_json(path, found)
    return found


def asked(only: Sequence[str], everything: bool) -> list[Section]:
    """The sections of a run, in order."""
    if only:
        return [section for section in (*SECTIONS, *MORE) if any(map(section.is_named, only))]
    checks, *rest = groups(SECTIONS)
    return [*checks, *([VARIANTS] if everything else []), *(section for group in rest for section in group)]


def about(device: str) -> dict[str, Any]:
    """Where, when and with what this run is."""
    run = describe_run(torch.get_num_threads())
    if device != "cuda":
        return run
    gpu = torch.cuda.get_device_properties(0)
    return run | {
        "cpu": run["device"],
        "device": torch.cuda.get_device_name(),
        "memory_bytes": gpu.total_memory,
        "multiprocessors": gpu.multi_processor_count,
        "cuda": torch.version.cuda or torch.version.hip,
        "nvidia_smi": nvidia_smi(
            "driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit", "temperature.gpu"
        ),
    }


def nvidia_smi(*names: str) -> dict[str, str]:
    """Properties of the first GPU; empty where the tool is not there."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = done.stdout.strip().split(", ")
    return dict(zip(names, values)) if done.returncode == 0 and len(values) == len(names) else {}


def environment(arguments: argparse.Namespace, section: Section, folder: Path, together: int) -> dict[str, str]:
    """Of a section's process, one of those that run `together`: threads, and where compilers keep what they made."""
    # NOTE the references run on the CPU: eight processes with a thread for every core each take minutes for seconds.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // together))} if together > 1 else {}
    if arguments.keep_caches or arguments.smoke:
        return os.environ | threads | {"TREESPEC_SUITE_CACHES": "as they were"}
    compiled = folder / f"caches-{section.caches}"
    return (
        os.environ
        | threads
        | {
            "TREESPEC_CACHE_DIR": str(folder / "treespec"),  # tuning tables are for all sections
            "TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"),
            "TRITON_CACHE_DIR": str(compiled / "triton"),
            "TREESPEC_SUITE_CACHES": "new",
            "TREESPEC_PROGRAM_CACHE": "0",  # what a section compiles is measured
        }
    )


def groups(sections: Sequence[Section]) -> list[list[Section]]:
    """Sections that run at the same time, in order."""
    found: list[list[Section]] = []
    for section in sections:
        if section.beside and found:
            found[-1].append(section)
        else:
            found.append([section])
    return found


class Running:
    """A section in a process of its own."""

    def __init__(
        self, arguments: argparse.Namespace, section: Section, budget: float, folder: Path, together: int = 1
    ) -> None:
        self.section, self.budget, self.began = section, budget, time.perf_counter()
        self.path, self.log = (folder / f"{slug(section.name)}.{kind}" for kind in ("json", "txt"))
        command = [sys.executable, __file__, "--device", arguments.device, "--run-section", section.name]
        command += [
            "--section-out",
            str(self.path),
            "--section-end",
            str(time.time() + budget),
            *(["--smoke"] * arguments.smoke),
        ]
        with self.log.open("w") as output:
            variables = environment(arguments, section, folder, together)
            self.process = subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT)

    def results(self) -> dict[str, Any]:
        """What it measured, whatever became of it."""
        status = "done"
        try:
            left = self.budget - (time.perf_counter() - self.began)
            if self.process.wait(timeout=max(0.0, left)):
                status = "failed"
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            status = "out of time"
        text = self.log.read_text(errors="replace")
        print(text, end="", file=sys.stderr, flush=True)
        end = {"status": status, "seconds": time.perf_counter() - self.began, "budget": self.budget}
        if status != "done":
            end["error"] = "\n".join(text.splitlines()[-15:])
        return (json.loads(self.path.read_text()) if self.path.is_file() else {}) | end


def run_section(arguments: argparse.Namespace) -> None:
    """In the section's own process; it leaves a few seconds for ending, what starting took is gone."""
    section = next(s for s in (*SECTIONS, *MORE) if s.name == arguments.run_section)
    module = importlib.import_module(f"gpu_sections.{section.module}")
    left = arguments.section_end - time.time() - 4
    context = Context(torch.device(arguments.device), arguments.smoke, left, Path(arguments.section_out))
    act: Callable[..., None] = module.run
    act(context, *section.arguments)


def print_report(found: dict[str, Any], markdown: bool) -> None:
    if found.get("status") == "not measured":
        show([Table("GPU suite", ("status", "reason"), [("not measured", found["reason"])])], [], markdown)
        return
    show(report.tables(found), report.notes(found), markdown)


if __name__ == "__main__":
    main()
