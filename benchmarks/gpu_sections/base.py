"""What every section has: a device, sizes, a deadline, and a file that keeps what was measured so far."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks, where a section is started by itself

COPY_BYTES = 2 << 30


@dataclass
class Context:
    """`smoke`: tiny sizes and eager kernels, to find out that a section runs at all; its times mean nothing."""

    device: torch.device
    smoke: bool
    budget: float
    path: Path
    """Where the section's results go."""
    results: dict[str, Any] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter)

    def left(self) -> float:
        """Seconds until the section is stopped from outside."""
        return self.budget - (time.perf_counter() - self._began)

    def keep(self, name: str, value: Any) -> None:
        """Write a result; what was kept survives a section that is stopped or fails."""
        self.results[name] = value
        whole = self.path.with_name(f"{self.path.name}.new")  # the process may be killed while it writes
        whole.write_text(json.dumps(self.results, indent=1), encoding="utf-8")
        whole.replace(self.path)

    def row(self, table: str, /, **cells: Any) -> None:
        """Add to a list of results."""
        self.keep(table, [*self.results.get(table, []), cells])
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in cells.items())
        print(f"  {table}: {shown}", file=sys.stderr, flush=True)

    def skipped(self, what: str, why: str) -> None:
        """Something that could not be measured here."""
        self.keep("skipped", [*self.results.get("skipped", []), {"what": what, "why": why}])
        print(f"  skipped {what}: {why}", file=sys.stderr, flush=True)

    def attempt(self, what: str, act: Callable[[], object]) -> None:
        """Do one of many; where it fails, the others are still done."""
        try:
            act()
        except Exception as error:
            self.skipped(what, reason(error))

    def pick(self, full: Any, smoke: Any) -> Any:
        return smoke if self.smoke else full

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def reason(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def milliseconds(
    context: Context,
    calls: Mapping[str, Callable[[], object]],
    budget: float,
    *,
    cold: bool = True,
    graph: bool = True,
) -> dict[str, float]:
    """Median of each call's time, taken in turns; compilation and recording come before. NaN: it failed."""
    usable: dict[str, Any] = {}
    for name, call in calls.items():
        try:
            usable[name] = timed(context, call, cold=cold, graph=graph)
        except Exception as error:
            context.skipped(name, reason(error))
    if not usable:
        return dict.fromkeys(calls, float("nan"))
    if context.on_gpu:
        from treespec_compiler.codegen.gpu.timing import interleaved

        values = interleaved(list(usable.values()), budget)
    else:
        values = [[one() for _ in range(3)] for one in usable.values()]
    found = {name: statistics.median(v) for name, v in zip(usable, values, strict=True)}
    return {name: found.get(name, float("nan")) for name in calls}


def timed(context: Context, call: Callable[[], object], *, cold: bool, graph: bool) -> Any:
    """Something that is timed again and again; on a CPU it gives milliseconds when it is called."""
    if context.on_gpu:
        from treespec_compiler.codegen.gpu.timing import Timed

        return Timed(call, context.device, cold=cold, graph=graph)
    call()

    def once() -> float:
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)

    return once


def wall_milliseconds(context: Context, calls: Mapping[str, Callable[[], object]], budget: float) -> dict[str, float]:
    """Median of each call from its start to the device being idle again, the host's part included; in turns."""
    for call in calls.values():
        for _ in range(3):  # the first is launched, the second recorded
            call()
    context.synchronize()
    values: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    while len(next(iter(values.values()))) < 5 or (
        time.perf_counter() - began < budget and len(next(iter(values.values()))) < 200
    ):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            context.synchronize()
            values[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(v) for name, v in values.items()}


def copy_rate(context: Context) -> float:
    """Bytes read and written a second by a copy inside the device's memory.

    NOTE launched, not recorded: a CUDA graph copies memory in a way that reaches two thirds of it on an H200.
    """
    size = COPY_BYTES if context.on_gpu else 1 << 20
    source = torch.empty(size, dtype=torch.uint8, device=context.device).random_(0, 255)
    target = torch.empty_like(source)
    if context.on_gpu:
        from treespec_compiler.codegen.gpu.timing import Timed, interleaved

        (values,) = interleaved([Timed(lambda: target.copy_(source), context.device, cold=False, graph=False)], 0.3)
        found = statistics.median(values)
    else:
        found = milliseconds(context, {"copy": lambda: target.copy_(source)}, 0.1)["copy"]
    return 2 * size / (1e-3 * found)
