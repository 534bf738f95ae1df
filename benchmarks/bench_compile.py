"""Seconds of capture and of each pass against the number of layers, for a Llama-8B shape with weights on meta.

    python benchmarks/bench_compile.py                     # table, and benchmarks/results/cpu/compile.json
    python benchmarks/bench_compile.py --layers 2 4        # other sizes
    python benchmarks/bench_compile.py --show FILE --markdown

Each size runs in a process of its own, so that a capture is a first one, as a user has it; imports are not counted. CPU
seconds stand beside those of the clock, since on a busy machine only they can be compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Table, describe_run, progress, read_report, show, write_json

OUTPUT = RESULTS / "compile.json"
LAYERS = (2, 4, 8, 16, 32)
SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
AIM_SECONDS, AIM_SHARE = 20.0, 1 / 3  # of 32 layers, on two quiet cores


def measure(layers: int) -> dict[str, Any]:
    """Convert once; clock and CPU seconds of the capture and of each pass (with the checks after it)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from treespec_compiler.capture.call import call_spec
    from treespec_compiler.options import Options
    from treespec_compiler.passes.framework.manager import Instrument, Pass, PassRecord, run_passes
    from treespec_compiler.passes.framework.state import GraphState
    from treespec_compiler.pipeline import prepare

    class Clock(Instrument):
        def __init__(self) -> None:
            self.passes: dict[str, dict[str, float]] = {}

        def before(self, state: GraphState, step: Pass) -> None:
            self.started = time.perf_counter(), time.process_time()

        def after(self, state: GraphState, step: Pass, record: PassRecord) -> None:
            now = time.perf_counter(), time.process_time()
            spent = dict(zip(("seconds", "cpu_seconds"), (b - a for a, b in zip(self.started, now, strict=True))))
            self.passes[step.name] = {**spent, "matches": record.matches}

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers)).to(torch.bfloat16).eval()
    clock, began = Clock(), (time.perf_counter(), time.process_time())
    prepared = prepare(model, call_spec(model), Options.parse({}))
    captured = time.perf_counter() - began[0], time.process_time() - began[1]
    run_passes(prepared.state, prepared.passes, prepared.checks, (), [clock])
    assert len(prepared.state.sites) == layers
    capture = dict(zip(("seconds", "cpu_seconds"), captured, strict=True))
    return {"layers": layers, "capture": capture, "passes": clock.passes, "nodes": len(prepared.state.graph.nodes)}


def measured_alone(layers: int) -> dict[str, Any]:
    """`measure` in a new process."""
    command = [sys.executable, __file__, "--one", str(layers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{layers} layers: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def total(run: dict[str, Any], unit: str, part: str = "all") -> float:
    passes = sum(p[unit] for p in run["passes"].values())
    return {"passes": passes, "capture": run["capture"][unit], "all": passes + run["capture"][unit]}[part]


def line(layers: Sequence[int], seconds: Sequence[float]) -> dict[str, float]:
    """Least squares seconds = fixed + each * layers, and how far the points are from it (of the largest)."""
    if len(layers) < 2:
        return {"fixed": 0.0, "each_layer": seconds[0] / layers[0], "largest_deviation": 0.0}
    slope, fixed = statistics.linear_regression(layers, seconds)
    gaps = [abs(fixed + slope * n - s) for n, s in zip(layers, seconds, strict=True)]
    return {"fixed": fixed, "each_layer": slope, "largest_deviation": max(gaps) / max(seconds)}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    layers = [r["layers"] for r in runs]
    units = ("seconds", "cpu_seconds")
    fits = {u: {p: line(layers, [total(r, u, p) for r in runs]) for p in ("capture", "passes", "all")} for u in units}
    shares = {r["layers"]: total(r, "cpu_seconds", "passes") / total(r, "cpu_seconds") for r in runs}
    return {"lines": fits, "share_of_passes": shares}


def tables(report: dict[str, Any]) -> list[Table]:
    runs = report["runs"]
    whole = Table(
        "Seconds to capture and convert a Llama-8B shape on meta (clock, CPU in brackets)",
        ["layers", "capture", "passes", "together", "passes' share", "nodes"],
    )
    for r in runs:
        cells = [
            f"{total(r, 'seconds', p):.2f} ({total(r, 'cpu_seconds', p):.2f})" for p in ("capture", "passes", "all")
        ]
        share = total(r, "cpu_seconds", "passes") / total(r, "cpu_seconds")
        whole.add(str(r["layers"]), *cells, f"{share:.1%}", str(r["nodes"]), bold=r["layers"] == 32)
    each = Table(
        "CPU milliseconds of each pass, checks included", ["pass", *(f"{r['layers']} layers" for r in runs), "share"]
    )
    last = total(runs[-1], "cpu_seconds")
    for name in ("capture", *runs[-1]["passes"]):
        spent = [r["capture"] if name == "capture" else r["passes"][name] for r in runs]
        each.add(name, *(f"{1e3 * s['cpu_seconds']:.0f}" for s in spent), f"{spent[-1]['cpu_seconds'] / last:.1%}")
    return [whole, each]


def notes(report: dict[str, Any]) -> list[str]:
    found = report["summary"]["lines"]["cpu_seconds"]["all"]
    texts = [
        f"CPU seconds = {found['fixed']:.2f} + {found['each_layer']:.3f} a layer; no size is further than "
        f"{found['largest_deviation']:.1%} of the largest from that line."
    ]
    largest = next((r for r in report["runs"] if r["layers"] == 32), None)
    if largest is not None:
        clock, cpu = total(largest, "seconds"), total(largest, "cpu_seconds")
        share = total(largest, "cpu_seconds", "passes") / cpu
        met = "yes" if clock <= AIM_SECONDS and share <= AIM_SHARE else "no"
        texts.append(
            f"Aim, 32 layers: at most {AIM_SECONDS:.0f} s, passes at most a third: {met} ({clock:.1f} s by the clock, "
            f"{cpu:.1f} s of CPU, passes {share:.1%}; load average at the start {report['run']['load_average']:.1f})."
        )
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--show", type=Path, help="print the tables of a file that was written before")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    if arguments.show:
        report = read_report(arguments.show, "run", "runs", "summary")
    else:
        report = {"run": describe_run(torch.get_num_threads()), "shape": SHAPE, "runs": []}
        with progress(len(arguments.layers)) as say:
            for layers in sorted(arguments.layers):
                say(f"{layers} layers")
                report["runs"].append(measured_alone(layers))
        report["summary"] = summary(report["runs"])
        write_json(arguments.output, report)
    show(tables(report), notes(report), arguments.markdown)


if __name__ == "__main__":
    main()
