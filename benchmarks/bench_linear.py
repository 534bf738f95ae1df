"""Skinny GEMM, float32, CPU: treespec's packed_linear against ATen and Inductor's C++ GEMM template.

    python benchmarks/bench_linear.py                 # table, and benchmarks/results/cpu/linear.json
    python benchmarks/bench_linear.py --inductor 0    # without the minutes of compilation
    python benchmarks/bench_linear.py --inductor 0 --forms --output forms.json    # narrow weights beside float32 ones

Every weight of a group is used once per pass, so that weights come from where a model's come from. Passes of the
implementations alternate. A verifier wants the column of 8 rows to cost what the column of 1 row costs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, describe_run, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor import select_algorithm

from treespec_compiler.codegen import cpu
from treespec_compiler.ir import ops
from treespec_compiler.ir.narrow import FORMS
from treespec_compiler.ir.panels import GROUP

ROWS = (1, 2, 4, 8, 16, 32, 64)
BY_VALUE = [form.name for form in FORMS.values() if not form.header]
"""Forms of which a weight can be drawn without a file."""
GROUPS = ((1024, 1024, 24), (1280, 512, 8), (512, 1280, 8), (1024, 512, 8), (512, 1024, 8))  # N, K, layers


@dataclass
class Entry:
    threads: int
    n: int
    k: int
    layers: int
    rows: int
    name: str
    median_us: float  # a layer
    min_us: float


def held_by(form: str, n: int, k: int) -> Tensor:
    """A weight [n, k] that the form holds."""
    if FORMS[form].k_block == 1:
        return torch.randn(n, k).to(FORMS[form].dtype).float()
    q = torch.randint(-8, 8, (n * k // GROUP, GROUP)).float()
    q[:, 0], q[:, 1] = -8, 7
    if form == "q8_0":
        q[:, 0] = 127
    return (q * torch.rand(len(q), 1).half().float()).view(n, k)


class Layers(nn.Module):
    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(w, requires_grad=False) for w in weights)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [F.linear(x, w) for w in self.layers]


def inductor(weights: list[Tensor], x: Tensor) -> Callable[[], object]:
    """Weights frozen and packed, M static, the faster of the C++ template and ATen as its autotuner finds it."""
    # NOTE: not as options of torch.compile: Dynamo itself asks whether weights are frozen
    config = {"max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN", "freezing": True}
    torch._dynamo.reset()
    select_algorithm.PRINT_AUTOTUNE = False
    with inductor_config.patch(config):
        compiled = torch.compile(Layers(weights).eval(), dynamic=False)
        compiled(x)
    return lambda: compiled(x)


@torch.no_grad()
def measure(threads: int, inductor_groups: int, repeats: int, forms: bool) -> list[Entry]:
    torch.set_num_threads(threads)
    entries = []
    # one thread: the time this thread ran, whatever else the machine does; several: what the clock on the wall says
    clock = time.thread_time if threads == 1 else time.perf_counter
    for group, (n, k, layers) in enumerate(GROUPS):
        weights = [torch.randn(n, k) for _ in range(layers)]
        packed = [ops.pack_weight(w) for w in weights]
        narrow = {f: [ops.pack_weight(held_by(f, n, k), f) for _ in weights] for f in (BY_VALUE if forms else ())}
        for rows in ROWS:
            x = torch.randn(rows, k)
            run: dict[str, Callable[[], object]] = {
                "treespec": lambda x=x, p=packed, n=n: [cpu.PACKED_LINEAR(x, w, None, n) for w in p],
                "aten": lambda x=x, weights=weights: [F.linear(x, w) for w in weights],
            }
            for form, stored in narrow.items():
                run[form] = lambda x=x, p=stored, n=n, form=form: [cpu.PACKED_LINEAR(x, w, None, n, form) for w in p]
            if group < inductor_groups:
                run["inductor"] = inductor(weights, x)
            seconds: dict[str, list[float]] = {name: [] for name in run}
            for _ in range(repeats):
                for name, function in run.items():
                    started = clock()
                    function()
                    seconds[name].append(clock() - started)
            for name, values in seconds.items():
                us = [1e6 * s / layers for s in values[2:]]
                entries.append(Entry(threads, n, k, layers, rows, name, statistics.median(us), min(us)))
    return entries


def show(entries: list[Entry]) -> None:
    console = Console(width=120)
    for threads, n, k, layers in dict.fromkeys((e.threads, e.n, e.k, e.layers) for e in entries):
        title = f"{layers} layers [{k} -> {n}], {threads} thread(s): median (best) us a layer"
        table = Table("", *(f"M={m}" for m in ROWS), title=title)
        group = [e for e in entries if (e.threads, e.n, e.k) == (threads, n, k)]
        for name in dict.fromkeys(e.name for e in group):
            table.add_row(name, *(f"{e.median_us:.0f} ({e.min_us:.0f})" for e in group if e.name == name))
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--inductor", type=int, default=1, metavar="N", help="with Inductor for the first N groups")
    parser.add_argument("--forms", action="store_true", help="with weights in every narrow form")
    parser.add_argument("--output", type=Path, default=RESULTS / "linear.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not cpu.load():
        sys.exit("no native kernels: see the warning above")
    if given.worker:  # a process for each thread count: Inductor compiles it in
        entries = measure(given.threads[0], given.inductor, given.repeats, given.forms)
        given.output.write_text(json.dumps([asdict(e) for e in entries]))
        return
    entries, about = [], describe_run(given.threads)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    for threads in given.threads:
        part = given.output.with_suffix(f".{threads}.tmp")
        command = [sys.executable, __file__, "--worker", "--threads", str(threads), "--repeats", str(given.repeats)]
        command += ["--inductor", str(given.inductor), "--output", str(part)] + ["--forms"] * given.forms
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        entries += [Entry(**e) for e in json.loads(part.read_text())]
        part.unlink()
    show(entries)
    write_json(given.output, {"meta": about, "entries": [asdict(e) for e in entries]})


if __name__ == "__main__":
    main()
