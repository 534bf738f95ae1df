"""Everything that only a GPU can tell, in one run of less than eight minutes.

    python benchmarks/gpu_suite.py                                # on the GPU at hand
    python benchmarks/gpu_suite.py --only numerics attention      # some sections
    python benchmarks/gpu_suite.py --show FILE --markdown         # the tables of a run
    python benchmarks/gpu_suite.py --device cpu --smoke           # whether the script runs at all; no figures

Each section is a process with a time of its own: one that fails or takes too long leaves what it had measured, and the
others run. Caches are new, so compilation is cold; `compile again` repeats it with the caches that 8B left. Results:
benchmarks/results/<device>/gpu_suite.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
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
from common import Table, describe_run, show, write_json
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
    """Runs at the same time as the section before; only for sections that time nothing."""


SECTIONS = (
    Section("numerics", "numerics", 90),
    Section("oracle 1", "oracle", 90, ("0", "2"), beside=True),
    Section("oracle 2", "oracle", 90, ("1", "2"), beside=True),
    Section("tune", "tune", 60),
    Section("attention", "attention", 90),
    Section("step 8B", "steps", 150, ("8B",)),
    Section("compile again", "compile_again", 60, ("8B",)),
    Section("step 1B", "steps", 90, ("1B",)),
    Section("decode", "decode", 60),
)


def main() -> None:
    arguments = parse()
    if arguments.run_section:
        run_section(arguments)
        return
    if arguments.show:
        print_report(json.loads(arguments.show.read_text()), arguments.markdown)
        return
    why = obstacle(arguments)
    if why:
        print(f"gpu_suite: not measured: {why}", file=sys.stderr)
        if arguments.out:
            write_json(arguments.out, {"status": "not measured", "reason": why})
        raise SystemExit(1)
    found = run(arguments)
    path = arguments.out or RESULTS / slug(found["run"]["device"]) / "gpu_suite.json"
    write_json(path, found)
    print_report(found, arguments.markdown)
    print(f"written to {path}", file=sys.stderr)
    failed = [name for name, section in found["sections"].items() if section["status"] != "done"]
    raise SystemExit(1 if failed else 0)


def parse() -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--only", nargs="+", choices=[s.name for s in SECTIONS], metavar="SECTION")
    parser.add_argument("--budget", type=float, default=TOTAL, help=f"seconds in all (default: {TOTAL:.0f})")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--keep-caches", action="store_true", help="use the caches there are; compilation is warm then")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the tables of a run and measure nothing")
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    for hidden in ("--run-section", "--section-out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--section-budget", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def obstacle(arguments: argparse.Namespace) -> str:
    """Why nothing can be measured here; empty: it can."""
    if arguments.device == "cpu":
        return "" if arguments.smoke else "a CPU has no GPU's figures (--smoke tries the script out)"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return ""


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All sections, one after the other, within the time."""
    began = time.perf_counter()
    about = describe_run(torch.get_num_threads())
    if arguments.device == "cuda":
        about |= {"cpu": about["device"], "device": torch.cuda.get_device_name()}
    report_ = {"status": "smoke" if arguments.smoke else "measured", "run": about, "sections": {}}
    sections: dict[str, Any] = report_["sections"]
    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as folder:
        environment = os.environ | (
            {"TREESPEC_SUITE_CACHES": "as they were"}
            if arguments.keep_caches or arguments.smoke
            else new_caches(Path(folder) / "caches")
        )
        for group in groups([s for s in SECTIONS if not arguments.only or s.name in arguments.only]):
            left = arguments.budget - (time.perf_counter() - began)
            if left < 10:
                sections |= {section.name: {"status": "no time left"} for section in group}
                continue
            names = ", ".join(section.name for section in group)
            print(f"{names} ({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)
            started = [Running(arguments, s, min(s.budget, left), environment, Path(folder)) for s in group]
            sections |= {one.section.name: one.results() for one in started}
        tables = list(Path(folder).glob("tree_attention-*.json"))
        report_["tuning_tables"] = {path.stem.partition("-")[2]: json.loads(path.read_text()) for path in tables}
    report_["seconds"] = time.perf_counter() - began
    report_["projection"] = report.projection(sections)
    return report_


def new_caches(folder: Path) -> dict[str, str]:
    """Where compiled code goes, of every compiler."""
    names = ("TREESPEC_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    return {name: str(folder / name.split("_")[0].lower()) for name in names} | {"TREESPEC_SUITE_CACHES": "new"}


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
        self, arguments: argparse.Namespace, section: Section, budget: float, environment: dict[str, str], folder: Path
    ) -> None:
        self.section, self.budget, self.began = section, budget, time.perf_counter()
        self.path, self.log = (folder / f"{slug(section.name)}.{kind}" for kind in ("json", "txt"))
        command = [sys.executable, __file__, "--device", arguments.device, "--run-section", section.name]
        command += ["--section-out", str(self.path), "--section-budget", str(budget), *(["--smoke"] * arguments.smoke)]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

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
        return end | (json.loads(self.path.read_text()) if self.path.is_file() else {})


def run_section(arguments: argparse.Namespace) -> None:
    """In the section's own process."""
    section = next(s for s in SECTIONS if s.name == arguments.run_section)
    module = importlib.import_module(f"gpu_sections.{section.module}")
    context = Context(
        torch.device(arguments.device), arguments.smoke, arguments.section_budget - 5, Path(arguments.section_out)
    )
    act: Callable[..., None] = module.run
    act(context, *section.arguments)


def print_report(found: dict[str, Any], markdown: bool) -> None:
    if found.get("status") == "not measured":
        show([Table("GPU suite", ("status", "reason"), [("not measured", found["reason"])])], [], markdown)
        return
    show(report.tables(found), report.notes(found), markdown)


if __name__ == "__main__":
    main()
